"""A checkpoint is on disk whole or not at all, whatever happens while it is written; the newest that verifies wins."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint, save_checkpoint
from tests.support.checkpoints import FILES, in_child, newest_step, save, tensors_of


def test_what_was_saved_is_read_back_and_only_two_are_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None

    save(tmp_path / "checkpoints", 2, 4, 10)

    assert newest_step(tmp_path / "checkpoints") == 10
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-4"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2, 4)
    path = tmp_path / "step-4" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        # Inside a value: JSON that still parses must not be believed either.
        place = content.rindex(b"4") if name == "state.json" else len(content) - 20
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    assert newest_step(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4.corrupt"]
    assert "step-4 is broken and was renamed to step-4.corrupt" in caplog.text
    save(tmp_path, 4)
    assert newest_step(tmp_path) == 4


def test_a_checkpoint_killed_at_any_moment_leaves_the_newest_usable(tmp_path: Path) -> None:
    """SIGKILL before the first, the second, … operation on the file system, until the save gets through."""
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


def test_a_file_that_cannot_grow_leaves_the_earlier_checkpoints_and_no_debris(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    large = tensors_of(3, 100_000)

    def save_beyond_the_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save_checkpoint(tmp_path, 3, large, {})

    assert os.waitstatus_to_exitcode(in_child(save_beyond_the_limit)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert newest_step(tmp_path) == 2


def test_a_checkpoint_that_does_not_read_back_replaces_no_earlier_one(tmp_path: Path) -> None:
    """A disk that changes what it was given, without an error."""
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


SAVE_UNTIL_FULL = """
import sys
from pathlib import Path
from tests.support.checkpoints import newest_step, save
from qlora_trainer.core.outcome import classify
folder = Path(sys.argv[1])
save(folder, 1, 2, size=20_000)
try:
    save(folder, 3, size=200_000)
except Exception as error:
    print(int(classify(error).exit_code), newest_step(folder), sorted(p.name for p in folder.iterdir()))
"""


def test_a_full_volume_ends_with_its_own_exit_code_and_the_earlier_checkpoints(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{SAVE_UNTIL_FULL}' {tmp_path}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")

    assert result.stdout.strip() == f"{int(ExitCode.STORAGE_FULL)} 2 ['step-1', 'step-2']", result.stderr
