"""The shipped settings in Argo CD's own code, which parses them and runs their Lua; a job in every phase."""

import json
import subprocess
from typing import Any

import pytest
import yaml

from devcluster import toolchain
from devcluster.layout import from_environment
from gitops import generate
from tests.support.phases import Case, cases, changed_spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, Any]]:
    """By the case's name: health and offered actions, each with the object that it would write."""
    program = toolchain.built(from_environment(), ["argo-cd-lua"])["argo-cd-lua"]
    settings = yaml.safe_load(generate.VALUES.read_text())["configs"]["cm"]
    given = {"settings": settings, "objects": [case.body for case in cases()]}
    said = subprocess.run([program], input=json.dumps(given), capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stderr
    return dict(zip((case.name for case in cases()), json.loads(said.stdout), strict=True))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_argo_cd_shows_the_health_of_every_phase(case: Case, shown: dict[str, dict[str, Any]]) -> None:
    health = shown[case.name]["health"]
    assert health["status"] == case.health
    assert health["message"].startswith(case.message)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_argo_cd_offers_the_action_that_fits_which_changes_one_field(
    case: Case, shown: dict[str, dict[str, Any]]
) -> None:
    actions = shown[case.name]["actions"]
    if case.action is None:
        assert actions == {}
    else:
        assert actions == {case.action: case.body | {"spec": changed_spec(case.body, case.action)}}
