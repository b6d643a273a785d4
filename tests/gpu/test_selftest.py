"""`qlora-trainer selftest`, which checks an image on a node, passes on this machine."""

import subprocess
import sys

import pytest

from tests.support.commands.image import as_in_image

pytestmark = pytest.mark.image


def test_a_step_on_this_gpu_is_that_of_its_cpu() -> None:
    command = as_in_image([sys.executable, "-m", "qlora_trainer", "selftest"], {}, [])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 4
