"""Fuzz the parsers with atheris: `python -m tests.fuzz [TARGET …] [--seconds N]`, all of them if none is named.

An input that breaks a parser is kept in a file, and ends the target; `--replay FILE` runs it again. Exit code 1 then.
"""

import argparse
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import atheris

# The parsers must be imported here first, or libFuzzer would not see which branches an input takes.
with atheris.instrument_imports(include=["qlora_api", "qlora_cli", "qlora_client", "qlora_operator", "qlora_trainer"]):
    from tests.fuzz.answers import ANSWERS
    from tests.fuzz.documents import DOCUMENTS
    from tests.fuzz.downloads import DOWNLOADS
    from tests.fuzz.files import FILES

TARGETS = DOCUMENTS | FILES | ANSWERS | DOWNLOADS
_MEMORY_MIB = 4096
_SECONDS_AN_INPUT = 20
_LONGEST_INPUT = 4096


def fuzz(name: str, seconds: int, crashes: Path, replay: Path | None) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        corpus, folder = Path(scratch, "corpus"), Path(scratch, "files")
        folder.mkdir()
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            target.check(seed, folder)
            (corpus / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            f"-artifact_prefix={crashes}/{name}-",
            f"-rss_limit_mb={_MEMORY_MIB}",
            f"-timeout={_SECONDS_AN_INPUT}",
            f"-max_len={_LONGEST_INPUT}",
        ]
        atheris.Setup([name, *options, str(replay or corpus)], lambda content: target.check(content, folder))
        atheris.Fuzz()


def main(arguments: Sequence[str]) -> int:
    """Run each target in a new process, one by one; 1 if one of them was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=10, help="for each target; without end if 0")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder of what breaks a parser")
    parser.add_argument("--replay", type=Path, help="give the target this file instead of fuzzing it")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no target is called {unknown[0]!r}; there are {', '.join(TARGETS)}")
    options.crashes.mkdir(parents=True, exist_ok=True)
    logging.disable()
    broken = []
    for name in options.targets or TARGETS:
        log, failed = _in_child(partial(fuzz, name, options.seconds, options.crashes, options.replay))
        lines = log.splitlines()
        rate = next((line for line in reversed(lines) if line.startswith("Done ")), "done")
        print(f"{name}: {'broken' if failed else rate}", flush=True)  # noqa: T201 - the command's answer
        if failed:
            broken.append(name)
            print("\n".join(lines[-40:]), file=sys.stderr, flush=True)  # noqa: T201 - the traceback
    return 1 if broken else 0


def _in_child(action: Callable[[], None]) -> tuple[str, bool]:
    """Run the action in a fork, and return its output and whether it failed."""
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if not child:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
            try:
                action()
            except SystemExit:
                # A target is broken: libFuzzer writes the input as the interpreter ends.
                raise
            except BaseException:  # noqa: BLE001 - the copy must not go on as if it were the original
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        return log.read().decode(errors="replace"), status != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
