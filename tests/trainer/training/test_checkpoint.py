"""A checkpoint is on disk whole or not at all; the newest that verifies wins."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint, save_checkpoint
from tests.support.runs.checkpoints import in_child, newest_step, save, state_of


def test_saved_checkpoints_are_read_back_and_only_two_are_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None

    save(tmp_path / "checkpoints", 2, 4, 10)

    assert newest_step(tmp_path / "checkpoints") == 10
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-4"]


def test_tensors_of_every_type_that_is_saved_are_read_back(tmp_path: Path) -> None:
    """Those of optimizers in 32 and 8 bit, named so that narrow ones would come first."""
    tensors = {
        "a/state": torch.arange(33, dtype=torch.uint8),
        "b/weight": torch.randn(7, 5).to(torch.bfloat16),
        "c/step": torch.tensor(4),
        "d/step": torch.tensor(5.0),
        "e/empty": torch.zeros(0, 3),
    }

    saved = save_checkpoint(tmp_path, 1, {"optimizer": tensors}, state_of(1))

    read = saved.tensors("optimizer")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert set(saved.sha256) == {"optimizer.safetensors", "state.json"}


def test_a_checkpoint_killed_at_any_moment_leaves_the_newest_usable(tmp_path: Path) -> None:
    """SIGKILL before the first, the second, … operation, until the save gets through."""
    for crash_point in range(1, 200):
        folder = tmp_path / str(crash_point)
        save(folder, 1, 2)

        def save_and_die(folder: Path = folder, crash_point: int = crash_point) -> None:
            operations = iter(range(crash_point))

            def count(event: str, arguments: tuple[object, ...]) -> None:
                touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
                if touches and str(folder) in str(arguments[0]) and next(operations, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            save(folder, 3)

        status = in_child(save_and_die)
        assert newest_step(folder) in (2, 3)
        assert not list(folder.glob("*.corrupt"))
        assert not list(folder.glob(".*"))
        if status == 0:
            assert newest_step(folder) == 3
            assert crash_point > 10  # the sweep has gone through the whole save
            return
        assert os.WIFSIGNALED(status)
    pytest.fail("the save never got through")


def test_a_checkpoint_that_does_not_read_back_replaces_no_earlier_one(tmp_path: Path) -> None:
    """A disk that changes its data, without an error."""
    save(tmp_path, 1, 2)

    def save_on_a_bad_disk() -> None:
        def damage(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and str(arguments[1]).endswith("step-3"):
                file = Path(str(arguments[0])) / "adapter.safetensors"
                content = file.read_bytes()
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

        sys.addaudithook(damage)
        try:
            save(tmp_path, 3)
        except ValueError as error:
            (tmp_path / "said").write_text(str(error))

    assert in_child(save_on_a_bad_disk) == 0
    assert "step-3 is damaged: ValueError('adapter.safetensors has sha256 " in (tmp_path / "said").read_text()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-2", "step-3"]
    assert newest_step(tmp_path) == 2
