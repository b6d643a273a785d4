"""`make docs` fails on broken links and on pages that load files from other hosts."""

from pathlib import Path

import pytest

from docs.check_site import problems

GOOD = """
<h1 id="top">Home</h1>
<a href="#top">up</a> <a href="#__skip">skip</a> <a href="how-to/">folder</a> <a href="how-to/index.html#end">end</a>
<a href="https://example.org/nowhere#x">elsewhere</a> <a href="mailto:a@example.org">write</a>
<img src="images/a%20b.png"> <link rel="canonical" href="https://example.org/">
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site without a problem."""
    for name, text in {
        "index.html": GOOD,
        "how-to/index.html": '<p id="end"><a href="../index.html#top">home</a></p>',
        "images/a b.png": "",
        "404.html": '<a href="/nowhere">absolute</a>',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_good_site_has_no_problem(site: Path) -> None:
    assert [*problems(site)] == []


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        ('<a href="gone.html">', "how-to/index.html links to gone.html: there is no such file"),
        ('<a href="../images">', "how-to/index.html links to ../images: there is no such file"),
        ('<a href="#begin">', "how-to/index.html links to #begin: the page has no anchor #begin"),
        (
            '<a href="../index.html#end">',
            "how-to/index.html links to ../index.html#end: the page has no anchor #end",
        ),
        ('<img src="gone.png">', "how-to/index.html links to gone.png: there is no such file"),
        (
            '<script src="https://example.org/a.js"></script>',
            "how-to/index.html loads https://example.org/a.js: put the file into docs/ instead",
        ),
        (
            '<link rel="stylesheet" href="//example.org/a.css">',
            "how-to/index.html loads //example.org/a.css: put the file into docs/ instead",
        ),
    ],
)
def test_each_problem_is_reported_with_its_page(site: Path, added: str, problem: str) -> None:
    page = site / "how-to" / "index.html"
    page.write_text(page.read_text() + added)
    assert [*problems(site)] == [problem]
