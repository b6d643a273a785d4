"""The changelog's newest section is what Artifact Hub shows."""

import pytest

from release import changelog
from release.changelog import Entry
from release.errors import ReleaseError

TEXT = """\
# Changelog

## 0.2.0, 2026-12-01

### Added

- A field.

### Security

- A fix.

## 0.1.0, 2026-11-01

### Added

- Everything.
"""


def test_the_newest_section_has_its_date_and_its_entries_by_kind() -> None:
    section = changelog.newest(TEXT)
    assert (section.version, section.date) == ("0.2.0", "2026-12-01")
    assert section.entries == (Entry("added", "A field."), Entry("security", "A fix."))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("## 0.2.0, 2026-12-01", "## 0.2.0 (soon)", "line 3: expected `## X.Y.Z, DATE`, found `## 0.2.0 \\(soon\\)`"),
        ("### Added\n\n- A field.", "### News\n\n- A field.", "line 5: ### News is none of Added, Changed"),
        ("### Added\n\n- A field.", "- A field.", "line 5: an entry above the first"),
        (TEXT, "# Changelog\n", "no section of a version"),
    ],
)
def test_what_cannot_be_read_is_reported_with_its_line(old: str, new: str, complaint: str) -> None:
    with pytest.raises(ReleaseError, match=complaint):
        changelog.newest(TEXT.replace(old, new, 1))
