"""Files that `make fuzz` leaves of an input that breaks a parser."""

import subprocess
import sys
from pathlib import Path

# Without the other targets, whose instrumented imports take 15 seconds.
_A_BROKEN_PARSER = """
import sys
import types
from pathlib import Path

for others in ("ANSWERS", "DOCUMENTS", "DOWNLOADS", "FILES"):
    module = types.ModuleType(f"tests.fuzz.{others.lower()}")
    setattr(module, others, {})
    sys.modules[module.__name__] = module

from tests.fuzz import __main__ as fuzzing
from tests.fuzz.target import Target

def parse(content, folder):
    return 1 / (content[:1] != b"a")

fuzzing.TARGETS["broken"] = Target(parse, seeds=(b"b",))
crashes = Path(sys.argv[1])
found = fuzzing.main(["broken", "--seconds", "300", "--crashes", str(crashes)])
[kept] = crashes.iterdir()
again = fuzzing.main(["broken", "--replay", str(kept), "--crashes", str(crashes)])
print(found, again)
"""


def test_an_input_that_breaks_a_parser_is_kept_and_breaks_it_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _A_BROKEN_PARSER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "broken: broken\nbroken: broken\n1 1\n", done.stderr
    assert "ZeroDivisionError" in done.stderr
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("broken-")
    assert kept.read_bytes().startswith(b"a")
