"""Puts defects that the product once had back into the code, and reports any that the tests miss.

    python -m tests.mutants [NAME…]

Works on a copy in a temporary folder; the checkout is only read. Ends with 1 if a mutant survives, or if an entry no
longer fits the code. Tests of the trainer take seconds each, because every mutant starts PyTorch again.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutant import Mutant, Verdict, copy_sources, node_ids, read_catalog, run_tests, tail, try_mutant

CHECKOUT = Path(__file__).parents[2]


def replay(mutants: Sequence[Mutant], checkout: Path) -> int:
    """Try each mutant and print its verdict. Return 0 if each is caught, else 1."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, log = Path(folder) / "copy", Path(folder) / "pytest.log"
        copy_sources(checkout, copy)
        # A test that fails anyway would catch everything.
        code = run_tests(copy, node_ids(copy, [test for mutant in mutants for test in mutant.tests]), log)
        if code != 0:
            print(f"the tests do not pass without a mutant:\n{tail(log)}", flush=True)  # noqa: T201
            return 1
        verdicts: Counter[Verdict] = Counter()
        for mutant in mutants:
            started = time.monotonic()
            verdict, problem = try_mutant(mutant, copy, log)
            verdicts[verdict] += 1
            print(f"{verdict:8}  {mutant.name} ({time.monotonic() - started:.0f} s)", flush=True)  # noqa: T201
            if problem:
                print(f"          {problem}", flush=True)  # noqa: T201
    print(summary(verdicts))  # noqa: T201
    return 0 if verdicts[Verdict.CAUGHT] == len(mutants) else 1


def summary(verdicts: Counter[Verdict]) -> str:
    """The last line, with unexpected counts only if they are not zero."""
    parts = [f"{verdicts[Verdict.CAUGHT]} caught", f"{verdicts[Verdict.SURVIVED]} survived"]
    parts += [f"{verdicts[kind]} {kind.lower()}" for kind in (Verdict.DRIFTED, Verdict.BROKEN) if verdicts[kind]]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the named mutants, or all."""
    known = {mutant.name: mutant for mutant in read_catalog()}
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Replay defects: each must be caught.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="mutants to replay (default: all)")
    names = parser.parse_args(arguments).names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no mutant named {', '.join(unknown)}; there are: {', '.join(known)}")
    return replay([known[name] for name in names] or list(known.values()), CHECKOUT)


if __name__ == "__main__":
    sys.exit(main())
