"""`qlora-trainer selftest`, which checks an image on a node, passes on this machine."""

import subprocess
import sys


def test_a_step_on_this_gpu_is_that_of_its_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer", "selftest"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 4
