"""Puts defects into the code, and reports any that the tests miss.

    python -m tests.mutants [NAME…]
    python -m tests.mutants --sample 60 --seed 1 [--package operator …]

The first form replays the catalog: defects that the product once had. It ends with 1 if one survives, or if an entry no
longer fits the code. The second draws small changes of the product and prints the rate that the tests catch, with the
survivors. Both work on a copy in a temporary folder; the checkout is only read.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from devcluster.layout import from_environment
from tests.mutants import sample
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
    """Replay the named mutants, or all, or measure a sample."""
    known = {mutant.name: mutant for mutant in read_catalog()}
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Put defects into the code.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="defects of the catalog to replay (default: all)")
    parser.add_argument("--sample", type=int, help="draw so many small changes instead, and print the rate caught")
    parser.add_argument("--seed", type=int, default=1, help="which changes are drawn (default: %(default)s)")
    parser.add_argument("--package", action="append", choices=sample.PRODUCT, help="draw from this one (default: all)")
    options = parser.parse_args(arguments)
    if options.sample is not None:
        packages = options.package or list(sample.PRODUCT)
        tried = sample.measure(CHECKOUT, from_environment().cache / "reach", packages, options.sample, options.seed)
        print(sample.table(tried))  # noqa: T201
        return 0
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no mutant named {', '.join(unknown)}; there are: {', '.join(known)}")
    return replay([known[name] for name in options.names] or list(known.values()), CHECKOUT)


if __name__ == "__main__":
    sys.exit(main())
