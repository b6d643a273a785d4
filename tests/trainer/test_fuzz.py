"""Files that `make fuzz` leaves of an input that breaks a parser."""

import subprocess
import sys
from pathlib import Path

_A_BROKEN_PARSER = """
import sys
from tests.fuzz import __main__ as fuzzing
from tests.fuzz.target import Target

def parse(content, folder):
    return 1 / (content[:1] != b"a")

fuzzing.TARGETS["broken"] = Target(parse, seeds=(b"b",))
sys.exit(fuzzing.main(sys.argv[1:]))
"""


def _fuzz(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _A_BROKEN_PARSER, "broken", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_input_that_breaks_a_parser_is_kept_and_breaks_it_again(tmp_path: Path) -> None:
    found = _fuzz("--seconds", "300", "--crashes", tmp_path)
    assert (found.returncode, found.stdout) == (1, "broken: broken\n")
    assert "ZeroDivisionError" in found.stderr
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("broken-")
    assert kept.read_bytes().startswith(b"a")
    assert _fuzz("--replay", kept, "--crashes", tmp_path).returncode == 1
