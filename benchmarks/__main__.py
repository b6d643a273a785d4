"""Runs every benchmark, one after the other, on a machine that does nothing else; the results are in `results/`."""

import argparse
import subprocess
import sys
import time

BENCHMARKS = ("speed", "loop", "data")


def main() -> int:
    """Run them all; the exit code is the first one that is not 0."""
    argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__).parse_args()
    failed = 0
    for name in BENCHMARKS:
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        exit_code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
        print(f"== {name}: exit code {exit_code} after {time.monotonic() - began:.0f} s", flush=True)
        failed = failed or exit_code
    return failed


if __name__ == "__main__":
    sys.exit(main())
