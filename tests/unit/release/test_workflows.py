"""Workflows run nothing that somebody could replace."""

import pytest

from release import workflows

SHA = "3d3c42e5aac5ba805825da76410c181273ba90b1"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("- uses: actions/checkout@v4", "name the commit"),
        ("- uses: actions/checkout@main # v4", "name the commit"),
        (f"- uses: actions/checkout@{SHA[:-1]} # v4", "name the commit"),
        (f"- uses: actions/checkout@{SHA}", "say the version"),
        (f"  uses: actions/checkout@{SHA} # main", "say the version"),
        ("  image: debian:12", "name the digest"),
        ("container: debian:12", "name the digest"),
    ],
)
def test_what_is_not_pinned_is_found_with_its_line(line: str, complaint: str) -> None:
    (finding,) = workflows.unpinned(f"jobs:\n{line}\n")
    assert finding.startswith("line 2: ")
    assert complaint in finding


@pytest.mark.parametrize(
    "line",
    [
        f"- uses: actions/checkout@{SHA} # v7.0.1",
        "- uses: ./local",
        "image: debian:12@sha256:" + "0" * 64,
        "container:",
    ],
)
def test_what_is_pinned_is_not_reported(line: str) -> None:
    assert workflows.unpinned(line) == []


def test_what_workflows_run_is_pinned() -> None:
    assert workflows.findings() == []
