"""Makes the pictures of the README and the site from a real run: the report, the watch and the terminal.

    make demo | tee demo.log
    make walk WALK_OPTIONS=--terminals
    .venv/bin/python -m docs.screenshots --report demo-output/report/report.html --watch demo.log \
        --terminals walk-output/terminals

Needs Chromium (Debian's package `chromium`), and the walk with `--terminals` needs tmux.
"""

import argparse
import html
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
_REPORT_SIZE = (1100, 1075)
_CHARACTER_WIDTH = 8.43
_LINE_HEIGHT = 22
# More lines of one phase add nothing.
_LINES_PER_PHASE = 3

_TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #1e2530; border-radius: 8px; }}
pre {{ margin: 0; padding: 18px 22px; color: #d8dee9; font: 14px/{line_height}px "DejaVu Sans Mono", monospace; }}
b {{ color: #8fbc8f; font-weight: 600; }}
i {{ display: inline-block; width: 1ch; height: {line_height}px; vertical-align: top; }}
</style><pre>{text}</pre>"""

# Readable on the background above: black to white, then the bright ones.
_DARK = [(59, 66, 82), (191, 97, 106), (143, 188, 143), (235, 203, 139), (129, 161, 193), (180, 142, 173)]
_COLORS = [*_DARK, (136, 192, 208), (229, 233, 240)]
_THEME = TerminalTheme((30, 37, 48), (216, 222, 233), _COLORS, _COLORS)


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
    """The lines of the watch as they look in a terminal."""
    return _page("kubectl get qlorajobs --watch", "\n".join(map(html.escape, lines)))


def colored_page(command: str, screen: str) -> str:
    """Return the terminal after the command, colored as `screen`'s escape sequences."""
    width = max(map(len, plain_lines(screen)))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen), soft_wrap=True)
    return _page(command, console.export_html(theme=_THEME, code_format="{code}", inline_styles=True).rstrip("\n"))


def plain_lines(screen: str) -> list[str]:
    """The lines of a terminal without the escape sequences of their colors."""
    return Text.from_ansi(screen).plain.splitlines() or [""]


def _dotted(character: str) -> str:
    """Draw a Braille pattern over its whole cell: fonts differ in width and gaps."""
    # Bits of U+2800 and following: dots 1 to 3 and 7 are the left column from top to bottom, 4 to 6 and 8 the right.
    cells = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    raised = [cell for bit, cell in enumerate(cells) if (ord(character) - 0x2800) >> bit & 1]
    dots = [
        f"radial-gradient(circle at {25 + 50 * column}% {12.5 + 25 * row}%, currentColor 1.2px, transparent 1.8px)"
        for column, row in raised
    ]
    return f'<i style="background: {", ".join(dots)}"></i>' if dots else " "


def _page(command: str, shown: str) -> str:
    drawn = re.sub("[\u2800-\u28ff]", lambda found: _dotted(found[0]), shown)
    text = f"<b>$</b> {html.escape(command)}\n{drawn}"
    return _TERMINAL.format(line_height=_LINE_HEIGHT, text=text)


def _photograph_terminal(page: str, lines: list[str], target: Path) -> None:
    """Photograph the page of `lines`, the command first, in a picture of their size."""
    size = (round(max(map(len, lines)) * _CHARACTER_WIDTH) + 44, len(lines) * _LINE_HEIGHT + 36)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "terminal.html")
        file.write_text(page)
        photograph(file.as_uri(), target, size)


def photograph(address: str, target: Path, size: tuple[int, int]) -> None:
    """Write Chromium's picture of the page, in a window of width and height in pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/screenshots.py needs Chromium: apt-get install chromium")
    width, height = size
    # Without the last one, parts of the page may be missing that are not painted yet.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    options += ["--run-all-compositor-stages-before-draw"]
    command = [browser, *options, f"--window-size={width},{height}", f"--screenshot={target}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Write the pictures that the options name into docs/images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="report.html of a finished run")
    parser.add_argument("--watch", type=Path, help="output of `make demo`, or of `kubectl get qlorajobs --watch`")
    parser.add_argument("--terminals", type=Path, help="folder that `make walk WALK_OPTIONS=--terminals` has filled")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if arguments.report:
        photograph(arguments.report.resolve().as_uri(), IMAGES / "report.png", _REPORT_SIZE)
    if arguments.watch:
        lines = watch_lines(arguments.watch.read_text())
        _photograph_terminal(terminal_page(lines), ["", *lines], IMAGES / "watch.png")
    for file in sorted(arguments.terminals.glob("*.ansi")) if arguments.terminals else []:
        command, _, screen = file.read_text().rstrip("\n").partition("\n")
        lines = [f"$ {command}", *plain_lines(screen)]
        _photograph_terminal(colored_page(command, screen), lines, IMAGES / f"{file.stem}.png")


if __name__ == "__main__":
    main()
