"""The process of a step: which steps may reach the Hub, and that the library obeys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.status import StepName
from qlora_trainer.core.context import Device
from qlora_trainer.core.process import ALLOCATOR_SETTINGS, set_environment
from tests.support.services.fault_proxy import Fault, FaultProxy, serve_proxy

ASK_THE_HUB = """
import sys
from pathlib import Path
from qlora_trainer.core.process import set_environment

set_environment(sys.argv[1], Path(sys.argv[2]))
from huggingface_hub import HfApi

try:
    HfApi().model_info("acme/tiny")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace the environment in this test by one without offline settings."""
    values = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    monkeypatch.setattr(os, "environ", values)
    return values


@pytest.mark.parametrize(
    ("step", "publishes_to_hub", "offline"),
    [
        ("prepare", False, False),
        ("prepare", True, False),
        ("train", False, True),
        ("train", True, True),
        ("publish", False, True),
        ("publish", True, False),
        ("clean", False, True),
        ("clean", True, True),
    ],
)
def test_only_a_step_that_reads_from_the_hub_or_publishes_there_is_online(
    step: StepName, publishes_to_hub: bool, offline: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    set_environment(step, tmp_path, publishes_to_hub=publishes_to_hub)
    assert environment.get("HF_HUB_OFFLINE") == ("1" if offline else None)
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"


OLDER, NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("step", "device", "given", "found"),
    [
        ("train", "cuda", {}, {NAME: ALLOCATOR_SETTINGS}),
        ("train", "cpu", {}, {}),
        ("prepare", "cuda", {}, {}),
        ("train", "cuda", {NAME: "backend:cudaMallocAsync"}, {NAME: "backend:cudaMallocAsync"}),
        ("train", "cuda", {OLDER: "max_split_size_mb:512"}, {OLDER: "max_split_size_mb:512"}),
    ],
)
def test_training_on_a_gpu_has_expandable_segments_unless_the_allocator_is_set(
    step: StepName,
    device: Device,
    given: dict[str, str],
    found: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    for name in (NAME, OLDER):
        environment.pop(name, None)
    environment.update(given)
    set_environment(step, tmp_path, device=device)
    assert {name: environment[name] for name in (NAME, OLDER) if name in environment} == found


@pytest.mark.parametrize(
    ("step", "device", "found"),
    [("train", "cuda", "0,1"), ("train", "cpu", ""), ("prepare", "cuda", ""), ("publish", "cuda", "")],
)
def test_only_a_step_that_trains_on_a_gpu_sees_one(
    step: StepName, device: Device, found: str, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"
    set_environment(step, tmp_path, device=device)
    assert environment["CUDA_VISIBLE_DEVICES"] == found


PRINT_ENVIRONMENT = """
import os
from pathlib import Path
import sys
from qlora_trainer.core.process import set_environment

set_environment("train", Path(sys.argv[1]), device="cuda")
assert "torch" not in sys.modules
from qlora_trainer.training.distributed.launch import RankInfo, start_child_ranks

child = "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'said').write_text(os.environ['PYTORCH_ALLOC_CONF'])"
with start_child_ranks(RankInfo(size=2, local_size=2), [sys.executable, "-S", "-c", child, sys.argv[1]]):
    pass
"""


def test_the_allocator_is_set_before_torch_is_loaded_and_child_ranks_inherit_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for name in (NAME, OLDER):
        environment.pop(name, None)
    command = [sys.executable, "-c", PRINT_ENVIRONMENT, str(tmp_path)]
    subprocess.run(command, env={**environment, "HOME": str(tmp_path)}, timeout=120, check=True)
    assert (tmp_path / "said").read_text() == ALLOCATOR_SETTINGS


@pytest.mark.parametrize(("step", "requests"), [("train", 0), ("prepare", 1)])
def test_the_library_of_the_hub_sends_nothing_while_training(
    step: StepName, requests: int, environment: dict[str, str], tmp_path: Path
) -> None:
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404))) as hub:
        done = subprocess.run(
            [sys.executable, "-c", ASK_THE_HUB, step, str(tmp_path)],
            env={**environment, "HF_ENDPOINT": f"http://{hub.address}", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert len(hub.seen) == requests, (hub.seen, done.stdout)
    assert done.stdout.strip() == ("HfHubHTTPError" if requests else "OfflineModeIsEnabled")


def test_pytorch_reads_the_settings_of_its_allocator() -> None:
    """An unknown one would end every train step on a GPU."""
    code = f"import torch; torch._C._accelerator_setAllocatorSettings({ALLOCATOR_SETTINGS!r})"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
