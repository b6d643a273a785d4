"""Checks the built site, as a hook of MkDocs: each link leads somewhere, and no page loads anything from elsewhere.

MkDocs itself checks the links that are written in Markdown; this also covers raw HTML, images and the theme's own.
"""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class _Page(HTMLParser):
    """The links, loaded files and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what the element refers to, and its id."""
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if _LOADING.get(tag) in values and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values[_LOADING[tag]])


def problems(site: Path) -> Iterator[str]:
    """Return a line for each broken link and each file loaded from another host."""
    pages = {file.resolve(): _Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        if file.name == "404.html":  # served at any depth, so its links are absolute
            continue
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{file.relative_to(site.resolve())} loads {address}: put the file into docs/ instead"
        for address in [*page.links, *page.loaded]:
            if problem := _broken(address, file, pages):
                yield f"{file.relative_to(site.resolve())} links to {address}: {problem}"


def _broken(address: str, file: Path, pages: dict[Path, _Page]) -> str | None:
    """Why the address leads nowhere; None if it does, or if it is on another host."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return "there is no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors | {"__skip"}:
        return f"the page has no anchor #{anchor}"
    return None


def on_post_build(config: Any) -> None:
    """Fail the build with every problem that was found."""
    # Not at the top: the tests of `problems` run where MkDocs is not installed.
    from mkdocs.exceptions import PluginError

    found = list(problems(Path(config["site_dir"])))
    if found:
        raise PluginError("\n".join(["The built site has broken links:", *found]))
