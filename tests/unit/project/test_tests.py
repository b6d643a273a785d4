"""Rules of the test suite itself."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_no_module_imports_from_a_test_module() -> None:
    """Shared code is in tests/support: tests do not import from tests."""
    imports = re.compile(r"^(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    assert [str(path) for path in TESTS.rglob("*.py") if imports.search(path.read_text())] == []
