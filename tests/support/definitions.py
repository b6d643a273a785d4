"""Applies the CustomResourceDefinitions of this release to a test's API server."""

from functools import partial
from pathlib import Path

from devcluster.controlplane import ControlPlane
from tests.support.waiting import eventually

CRDS = Path(__file__).parents[2] / "crds"


def apply_definitions(plane: ControlPlane) -> None:
    """Return when the API server serves every kind."""
    for definition in sorted(CRDS.glob("*.yaml")):
        plane.kubectl.apply(definition.read_text())
    for kind in ("qlorajobs", "qlorasweeps"):
        eventually(partial(plane.kubectl, "get", kind, "--output=json"), seconds=60, what=kind)
