"""Promises to users: each names the tests that show it, and they exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rejected.inputs import DATA, MODELS, read_table

ROOT = Path(__file__).parents[3]
PAGES = {ROOT / "docs" / "trainer" / "promises.md": ROOT / "tests" / "trainer", ROOT / "SECURITY.md": ROOT}
"""With the folder of the tests that a page names without one."""


def promises() -> Iterator[tuple[str, str, Path]]:
    """Each promise, the text that names its tests, and the folder of those without one."""
    for page, folder in PAGES.items():
        tables = re.findall(
            r"^\| (?:Promise|Supported|Defense) .*\n\|[-| ]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE
        )
        assert tables
        for row in "".join(tables).splitlines():
            promise, shown = row.strip("| ").rsplit(" | ", 1)
            yield promise, shown, folder


@pytest.mark.parametrize(("promise", "shown", "folder"), promises(), ids=lambda value: str(value)[:60])
def test_each_promise_names_tests_that_exist(promise: str, shown: str, folder: Path) -> None:
    paths = [path for path in re.findall(r"`([\w./]+)`", shown) if "test_" in Path(path).name and "/" in path]
    folders = re.findall(r"`(tests/[\w/]+/)`", shown)
    files = [ROOT / path if path.startswith("tests/") else folder / path for path in paths]
    files += [file for name in folders for file in sorted((ROOT / name).rglob("test_*.py"))]
    assert files, promise
    assert [str(file) for file in files if not file.is_file()] == []
    text = "".join(file.read_text() for file in files)
    assert [name for name in re.findall(r"`(test_\w+)`", shown) if f"def {name}(" not in text] == []


def test_the_page_counts_the_rejected_inputs() -> None:
    page = (ROOT / "docs" / "trainer" / "promises.md").read_text()
    addresses = len(read_table("parsed.yaml")["addresses"])
    assert f"| {len(MODELS)} hostile models and {addresses} hostile addresses are rejected" in page
    rows = sum(map(len, read_table("rows.yaml").values()))
    assert f"| {len(DATA)} wrong or hostile data sets and {rows} wrong rows are rejected" in page
