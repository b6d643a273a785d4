"""The process of a step: which steps may reach the Hub, and that the library obeys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.status import StepName
from qlora_trainer.core.process import set_environment
from tests.support.fault_proxy import Fault, FaultProxy, serve_proxy

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
    """The environment of the process, for this test only, in which nobody has set the libraries offline."""
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
