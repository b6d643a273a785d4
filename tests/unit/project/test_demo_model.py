"""The demo's model is made once, however many processes want it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Slow enough for the other process to find no folder yet. Like the real one it rejects a folder that exists.
MAKER = """
import sys, time
from pathlib import Path
output = Path(sys.argv[1])
with (output.parent / "made").open("a") as log:
    print("made", file=log)
time.sleep(0.3)
output.mkdir()
"""
ASK = """
import sys
from pathlib import Path
from examples.demo import __main__ as demo
demo.HERE = Path(sys.argv[1])
print(demo.model_folder())
"""


def test_two_processes_that_want_the_model_at_once_get_the_same() -> None:
    # Not pytest's folder: a cache must have a short path.
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        (Path(folder) / "model.py").write_text(MAKER)
        command, environment = [sys.executable, "-c", ASK, folder], os.environ | {"QLORA_CACHE": str(cache)}
        both = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        answers = [process.communicate(timeout=60)[0].strip() for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert answers[0] == answers[1]
        assert Path(answers[0]).is_dir()
        assert (cache / "made").read_text() == "made\n"
