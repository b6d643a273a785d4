"""Counts hits of the rules of docs/styles/QLoRA per 1,000 words of docs, docstrings, comments and descriptions."""

import argparse
import ast
import gc
import io
import json
import math
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from devcluster import toolchain
from devcluster.layout import from_environment

ROOT = Path(__file__).parents[1]
RULES = ("Actors", "Which", "Personified", "NounClauses", "Words", "Own")
# Hits per 1,000 words, by rule. Lower them when text is rewritten: the goals of the first three are 0, 0.4 and 0.3.
CEILINGS = {
    "crds": (0.2, 0.3, 0.2, 0.9, 0.5, 0.2),
    "cli": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "operator": (0.0, 0.2, 0.0, 0.2, 0.0, 0.2),
    "door": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "serving": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "trainer_image": (0.0, 0.1, 0.1, 0.2, 0.2, 0.2),
    "tests": (0.1, 0.2, 0.4, 0.7, 0.3, 0.2),
    "docs": (0.0, 0.1, 0.1, 0.2, 0.3, 0.4),
    "helm": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "devcluster": (0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
    "benchmarks": (0.0, 0.0, 0.0, 0.3, 0.3, 1.0),
    "other": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
# Vendored files, an earlier release, and pages that are generated from text that is read at its source.
_EXCLUDED = re.compile(
    r"third_party/|devcluster/tools/|tests/support/previous_release|.*/llama_cpp/"
    r"|docs/reference/(chart|cli|families|metrics|python|resource|sweep)\.md|helm/qlora-operator/README\.md"
)
_PRAGMA = re.compile(r"#\s*(noqa|type:|ruff:|mypy:|pragma)")
_FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1$", re.DOTALL | re.MULTILINE)
Hit = tuple[str, int, str, str]


def prose(path: Path) -> str:
    """The text of a file, on its line numbers; lines of code are empty."""
    text = path.read_text()
    if path.suffix == ".md":
        return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    if path.suffix == ".py":
        return "\n".join(_python(text))
    comments = (re.match(r"\s*#[# -]*(.*)", line) for line in text.splitlines())
    return "\n".join(comment[1] if comment else "" for comment in comments)


def _python(text: str) -> list[str]:
    """Comments, docstrings, and the constants of `description=` and `help=`."""
    lines = [""] * (text.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not _PRAGMA.match(token.string):
            lines[token.start[0] - 1] = token.string.lstrip("#: ")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node, clean=False) or "").splitlines()
            # A docstring with an escaped newline has more lines than its source.
            places = range(node.body[0].lineno - 1 if docstring else 0, len(lines))
            for number, line in zip(places, docstring, strict=False):
                lines[number] = line.strip()
        elif isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            values = (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
            lines[node.value.lineno - 1] = "".join(value for value in values if isinstance(value, str))
    return lines


def hits(vale: Path, texts: Mapping[str, str]) -> list[Hit]:
    """Return name, line, rule and message of each hit in the Markdown texts."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            file = Path(folder, f"{name}.md")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        options = [f"--config={ROOT / '.vale.ini'}", "--no-global", "--output=JSON", "--no-exit"]
        done = subprocess.run([vale, *options, "."], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise RuntimeError(f"vale failed: {done.stdout}{done.stderr}")
    found = ((name.removesuffix(".md"), alert) for name, alerts in json.loads(done.stdout).items() for alert in alerts)
    return sorted((name, a["Line"], a["Check"].removeprefix("QLoRA."), a["Message"]) for name, a in found)


def rates(texts: Mapping[str, str], found: Iterable[Hit]) -> dict[str, tuple[float, ...]]:
    """Return each folder's hits per 1,000 words, in RULES' order, up to a tenth."""
    words: Counter[str] = Counter()
    for name, text in texts.items():
        words[_folder(name)] += len(re.findall(r"[A-Za-z][\w'-]*", text))
    counts = Counter((_folder(name), rule) for name, _, rule, _ in found)
    return {
        folder: tuple(math.ceil(10_000 * counts[folder, rule] / words[folder]) / 10 for rule in RULES)
        for folder in CEILINGS
        if words[folder]
    }


def _folder(name: str) -> str:
    top, _, rest = name.partition("/")
    return "docs" if not rest or top == ".github" else top if top in CEILINGS else "other"


def main() -> int:
    """Print the rates; 1 if a folder exceeds a ceiling."""
    parser = argparse.ArgumentParser(prog="docs.words", description=__doc__)
    parser.add_argument("--places", metavar="FOLDER", nargs="?", const="", help="list all hits, or those in FOLDER")
    places = parser.parse_args().places
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.py", "helm/*.yaml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [name for name in listed if not _EXCLUDED.match(name) and (ROOT / name).exists()]
    # Syntax trees have many objects and no garbage: its collection would double the time.
    with ProcessPoolExecutor(initializer=gc.disable) as processes:
        texts = dict(zip(names, processes.map(prose, map(ROOT.joinpath, names), chunksize=50), strict=True))
    found = hits(toolchain.built(from_environment(), ["vale"])["vale"], texts)
    if places is not None:
        listing = (hit for hit in found if hit[0].startswith(places) or _folder(hit[0]) == places)
        print(*("{}:{}: {}: {}\n".format(*hit) for hit in listing), sep="")
    print(f"{'Per 1,000 words':<15}", *(f"{rule:>11}" for rule in RULES))
    failed = False
    for folder, row in rates(texts, found).items():
        print(f"{folder:<15}", *(f"{rate:>11}" for rate in row))
        for rule, rate, ceiling in zip(RULES, row, CEILINGS[folder], strict=True):
            if rate > ceiling:
                print(f"{folder}: {rule} may be {ceiling} at most; `make words IN={folder}` lists the hits")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
