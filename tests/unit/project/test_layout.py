"""Where modules are, what imports what, and how tests are laid out."""

import operator
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_standard_library_keeps_its_operator_module() -> None:
    assert Path(operator.__file__).parent == Path(sysconfig.get_path("stdlib"))
    subprocess.run([sys.executable, "-c", "import collections, operator; operator.add"], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", ["operator", "trainer_image", "crds", "cli", "door", "serving"])
def test_the_source_folders_hold_packages_and_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_module_of_the_trainer_is_in_a_package_but_the_entry() -> None:
    modules = {path.name for path in (ROOT / "trainer_image" / "qlora_trainer").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "runner.py"}


TESTS = Path(__file__).parents[2]


def test_no_module_imports_from_a_test_module() -> None:
    """Shared code is in tests/support: tests do not import from tests."""
    imports = re.compile(r"^(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    assert [str(path) for path in TESTS.rglob("*.py") if imports.search(path.read_text())] == []
