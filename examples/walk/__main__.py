"""The walk: runs the commands of a newcomer against the embedded cluster, and records them in docs/walk.md."""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from devcluster import cluster, layout, product
from devcluster.errors import ClusterError
from devcluster.product import ROOT
from examples.demo.__main__ import model_folder
from examples.walk.preparation import prepared, reject_work
from examples.walk.runner import Shell, WalkError, page, run
from examples.walk.steps import INTRODUCTION, TERMINALS, TITLE, UNINSTALL, WALK

_COLUMNS, _LINES = 110, 60


def screen_after(command: str, shell: Shell) -> str:
    """The terminal's lines when the command has ended, with the escape sequences of their colors.

    Raises WalkError if it takes too long. Needs tmux.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tmux = ["tmux", "-S", str(Path(scratch, "socket")), "-f", "/dev/null"]
        ended = Path(scratch, "ended")
        # The pane stays until it has been captured.
        script = f"export TERM=tmux-256color; {command}; touch {shlex.quote(str(ended))}; sleep infinity"
        environment = {name: value for name, value in shell.environment().items() if name not in ("NO_COLOR", "TMUX")}
        size = ["-x", str(_COLUMNS), "-y", str(_LINES)]
        subprocess.run(
            [*tmux, "new-session", "-d", *size, "bash", "-c", script], cwd=shell.folder, env=environment, check=True
        )
        try:
            deadline = time.monotonic() + shell.seconds
            while not ended.exists():
                if time.monotonic() > deadline:
                    raise WalkError(f"{command}: not done after {shell.seconds:.0f} s in a terminal")
                time.sleep(0.2)
            captured = subprocess.run(
                [*tmux, "capture-pane", "-e", "-p", "-N"], check=True, capture_output=True, text=True
            )
            return captured.stdout.rstrip("\n")
        finally:
            subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)


# The demo's model of 135 million parameters takes a second or two for each on two cores: time enough to suspend it.
_STEPS = 24


def main() -> int:
    """Run the walk, exit with 0 if each command succeeded, and then write its page."""
    parser = argparse.ArgumentParser(prog="make walk", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("walk-output"), help="where commands run; emptied first")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "walk.md", help="the page to write")
    parser.add_argument("--model", type=Path, help="folder of another base model than the demo's")
    parser.add_argument("--steps", type=int, default=_STEPS, help="optimizer steps of each job (default: %(default)s)")
    parser.add_argument(
        "--terminals", action="store_true", help="also keep the terminals, for docs/screenshots.py (needs tmux)"
    )
    try:
        return _walk(parser.parse_args())
    except (ClusterError, WalkError) as error:
        print(f"walk: {error}", file=sys.stderr)
        return 1


def _walk(options: argparse.Namespace) -> int:
    where = layout.from_environment()
    with cluster.locked(where):
        cluster.up(where, cluster.DEFAULT_GPUS)
    reject_work(cluster.kubectl_of(where))
    images = product.build_images(where)
    product.load_images(where, images)
    steps = [step.with_values({"steps": str(options.steps)}) for step in WALK]
    folder = options.folder.absolute()
    with prepared(where, images, options.model or model_folder(), folder, Path(sys.executable).parent) as shell:
        recorded = list(run((step for step in steps if step.chapter != UNINSTALL), shell, _show))
        if options.terminals:
            _keep_terminals(shell, folder / "terminals")
        recorded += run((step for step in steps if step.chapter == UNINSTALL), shell, _show)
    options.page.write_text(page(TITLE, INTRODUCTION, recorded))
    print(f"\n{options.page}")
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _keep_terminals(shell: Shell, folder: Path) -> None:
    """Write a file for each picture: the command, and the terminal after it."""
    folder.mkdir()
    for name, command in TERMINALS.items():
        (folder / f"{name}.ansi").write_text(f"{command}\n{screen_after(command, shell)}\n")


if __name__ == "__main__":
    sys.exit(main())
