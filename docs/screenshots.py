"""Makes the pictures of the README and the site from a real run: the report's page and the lines of the watch.

    make demo | tee demo.log
    .venv/bin/python docs/screenshots.py --report demo-output/report/report.html --watch demo.log

Needs Chromium (Debian's package `chromium`).
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
_REPORT_SIZE = (1100, 1075)
_CHARACTER_WIDTH = 8.43
_LINE_HEIGHT = 22
# More lines of one phase tell nobody anything.
_LINES_PER_PHASE = 3

_TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #1e2530; border-radius: 8px; }}
pre {{ margin: 0; padding: 18px 22px; color: #d8dee9; font: 14px/{line_height}px "DejaVu Sans Mono", monospace; }}
b {{ color: #8fbc8f; font-weight: 600; }}
</style><pre>{text}</pre>"""


def watch_lines(output: str) -> list[str]:
    """The lines of `kubectl get qlorajobs --watch` in the demo's output: the header, and some of each phase.

    Raises ValueError if there are none.
    """
    lines = output.splitlines()
    start = next((number for number, line in enumerate(lines) if re.match(r"NAME +PHASE +PROGRESS", line)), None)
    if start is None:
        raise ValueError("no line begins with NAME PHASE PROGRESS: give the output of `make demo`")
    phases: dict[str, list[str]] = {}
    for line in lines[start + 1 :]:
        if not (match := re.match(r"\S+ +([A-Z][a-z]+)\b.*\d+[smh]$", line.rstrip())):
            break
        phases.setdefault(match[1], []).append(line.rstrip())
    return [lines[start].rstrip(), *(line for found in phases.values() for line in _spread(found))]


def _spread(lines: list[str]) -> list[str]:
    """At most _LINES_PER_PHASE of the lines, the first and the last among them."""
    if len(lines) <= _LINES_PER_PHASE:
        return lines
    last = len(lines) - 1
    return [lines[round(number * last / (_LINES_PER_PHASE - 1))] for number in range(_LINES_PER_PHASE)]


def terminal_page(lines: list[str]) -> str:
    """The lines as they look in a terminal."""
    command = "<b>$</b> kubectl get qlorajobs --watch"
    return _TERMINAL.format(line_height=_LINE_HEIGHT, text="\n".join([command, *map(html.escape, lines)]))


def photograph(page: Path, target: Path, size: tuple[int, int]) -> None:
    """Write what Chromium shows of the page, in a window of that width and height in pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/screenshots.py needs Chromium: apt-get install chromium")
    width, height = size
    # Without the last one, parts of the page may be missing that are not painted yet.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    options += ["--run-all-compositor-stages-before-draw"]
    command = [browser, *options, f"--window-size={width},{height}", f"--screenshot={target}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Write docs/images/report.png and docs/images/watch.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="report.html of a finished run")
    parser.add_argument("--watch", type=Path, help="output of `make demo`, or of `kubectl get qlorajobs --watch`")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if arguments.report:
        photograph(arguments.report, IMAGES / "report.png", _REPORT_SIZE)
    if arguments.watch:
        lines = watch_lines(arguments.watch.read_text())
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder, "watch.html")
            page.write_text(terminal_page(lines))
            width = round(max(map(len, lines)) * _CHARACTER_WIDTH) + 44
            photograph(page, IMAGES / "watch.png", (width, (len(lines) + 1) * _LINE_HEIGHT + 36))


if __name__ == "__main__":
    main()
