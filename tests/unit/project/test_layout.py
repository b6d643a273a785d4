"""Where modules are: folders that shadow nothing, and a trainer whose modules are all in a package."""

import operator
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_standard_library_keeps_its_operator_module() -> None:
    assert Path(operator.__file__).parent == Path(sysconfig.get_path("stdlib"))
    subprocess.run([sys.executable, "-c", "import collections, operator; operator.add"], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", ["operator", "trainer_image", "crds", "cli"])
def test_the_source_folders_hold_packages_and_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_module_of_the_trainer_is_in_a_package_but_the_entry() -> None:
    modules = {path.name for path in (ROOT / "trainer_image" / "qlora_trainer").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "runner.py"}
