"""The definitions of the previous release and of this one on a real API server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.controlplane import ControlPlane, running
from qlora_operator.decisions.observed.stored_job import parse_job
from tests.support.manifests import MINIMAL, Manifest, with_value
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
PREVIOUS = ROOT / "tests" / "support" / "previous_release" / "qlorajobs.qlora.dev.yaml"
CURRENT = ROOT / "crds" / "qlorajobs.qlora.dev.yaml"


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    """An API server with the previous release's kind."""
    with running() as plane:
        install(plane, PREVIOUS)
        yield plane


def install(plane: ControlPlane, definition: Path) -> None:
    plane.kubectl.apply(definition.read_text())
    wanted = yaml.safe_load(definition.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    def served() -> bool:
        shown = plane.kubectl("get", "--raw", "/openapi/v3/apis/qlora.dev/v1beta1")
        found = json.loads(shown)["components"]["schemas"]["dev.qlora.v1beta1.QLoRAJob"]["properties"]
        return set(found["spec"]["properties"]) == set(wanted["properties"]["spec"]["properties"])

    eventually(served, seconds=60, what="the served schema")


def apply(plane: ControlPlane, manifest: Manifest) -> Manifest:
    applied: Manifest = json.loads(
        plane.kubectl("apply", "--output=json", "--filename=-", input_text=json.dumps(manifest))
    )
    return applied


def patch(plane: ControlPlane, name: str, spec: dict[str, Any]) -> Manifest:
    change = json.dumps({"spec": spec})
    patched: Manifest = json.loads(
        plane.kubectl("patch", "qlorajob", name, "--type=merge", f"--patch={change}", "--output=json")
    )
    return patched


def test_jobs_live_through_an_upgrade_and_a_rollback(plane: ControlPlane) -> None:
    plain = apply(plane, with_value(MINIMAL, "metadata.name", "plain"))

    install(plane, CURRENT)

    # The new definition gives no job a field that the previous operator would reject.
    assert plane.kubectl.get("qlorajob", "plain")["spec"] == plain["spec"]
    assert patch(plane, "plain", {"retry": {"request": "a"}})["spec"]["retry"]["request"] == "a"
    apply(plane, yaml.safe_load(json.dumps(with_value(MINIMAL, "metadata.name", "new"))))
    assert parse_job(plane.kubectl.get("qlorajob", "plain")).problem == ""

    install(plane, PREVIOUS)

    for name in ("plain", "new"):
        job = patch(plane, name, {"suspend": False})
        assert parse_job(job).problem == ""
