"""The GPU tests are skipped where a GPU is missing, too old or too small, and fail where its driver is."""

import os
import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.gpu import cards
from tests.gpu.cards import Card, lacking, unusable

pytest_plugins = ["pytester"]

T4 = Card("Tesla T4", (7, 5), 14.6)
A10 = Card("NVIDIA A10", (8, 6), 22.1)
H100 = Card("NVIDIA H100", (9, 0), 79.1)
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15\nGCC version: 12\n"
NO_CARD = """
from pathlib import Path
from tests.gpu import cards, conftest
from tests.gpu.conftest import *

conftest._cards = lambda: ()
conftest._is_ours = lambda path: True
cards.DRIVER_VERSION = cards.DRIVER_DEVICE = Path("driver")
"""


@pytest.mark.parametrize(
    ("cards", "wanted", "gib"), [((A10,), 1, 0), ((H100,), 1, 44), ((H100, A10), 2, 8), ((H100, T4), 1, 44)]
)
def test_a_test_runs_where_there_is_all_that_it_needs(cards: tuple[Card, ...], wanted: int, gib: float) -> None:
    assert lacking(cards, wanted, gib) is None


@pytest.mark.parametrize(
    ("cards", "wanted", "gib", "reason"),
    [
        ((), 1, 0, "needs 1 CUDA GPU of compute capability 8.0 (bfloat16) or later, this machine has none"),
        ((T4,), 1, 0, "8.0 (bfloat16) or later, this machine has Tesla T4 (14.6 GiB, capability 7.5)"),
        # A run takes the first GPU.
        ((T4, H100), 1, 0, "this machine has Tesla T4 (14.6 GiB, capability 7.5), NVIDIA H100"),
        ((A10,), 1, 44, "and at least 44 GiB, this machine has NVIDIA A10 (22.1 GiB, capability 8.6)"),
        ((H100,), 2, 8, "needs 2 CUDA GPUs of compute capability 8.0"),
    ],
)
def test_a_test_is_skipped_for_a_reason_that_names_what_is_needed_and_what_there_is(
    cards: tuple[Card, ...], wanted: int, gib: float, reason: str
) -> None:
    assert reason in (lacking(cards, wanted, gib) or "")


def test_hidden_gpus_are_no_defect_and_the_reason_says_that_they_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(cards, "DRIVER_VERSION", tmp_path / "version")
    assert unusable("2.15.0", "13.2", "") is None
    assert "CUDA_VISIBLE_DEVICES is set to nothing" in (lacking((), 1, 0, "") or "")


def test_a_run_fails_if_there_is_a_driver_and_pytorch_sees_no_gpu(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    pytester.makeconftest(NO_CARD)
    pytester.makepyfile("def test_of_one():\n    pass\n")
    pytester.makefile("", driver=DRIVER)
    # Not in this process, which may have had other stand-ins for the GPUs. Another one does not know pytest's paths.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    said = done.stderr.str()
    assert "this machine has NVIDIA's driver (NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15)" in said
    assert "CUDA_VISIBLE_DEVICES has to name GPUs that there are (it is '1')" in said


def test_a_machine_without_a_driver_has_nothing_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRIVER_VERSION", "DRIVER_DEVICE"):
        monkeypatch.setattr(cards, name, tmp_path / "none")
    assert unusable("2.15.0", "13.2", None) is None
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(cards, "DRIVER_DEVICE", tmp_path / "nvidiactl")
    assert "CUDA 13.2" in (unusable("2.15.0", "13.2", None) or "")


def test_the_page_names_the_cuda_that_pytorch_brings() -> None:
    """The driver that it needs stands beside it."""
    (brought,) = re.findall(r"cuda-toolkit.*==(\d+\.\d+)", "\n".join(requires("torch") or ()))
    page = (Path(__file__).parents[2] / "gpu" / "README.md").read_text()
    assert f"CUDA {brought} " in page
