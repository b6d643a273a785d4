"""Numbers of a spec that are floats: clients of the API server write and read the same ones, in any writing."""

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal

import pytest

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from qlora_api.spec.job import QLoRAJobSpec
from qlora_operator.decisions.observed.stored_job import parse_job
from tests.support.manifests import NUMBERS, Manifest, with_value

READ = QLoRAJobSpec.model_validate(NUMBERS["spec"])
WRITINGS: dict[str, Callable[[float], str]] = {
    "shortest": repr,
    "positional": lambda number: format(Decimal(repr(number)), "f"),
    "exponent": "{:.16e}".format,
}


def named(name: str, writing: str = "shortest") -> str:
    """A job with these numbers, written so."""
    manifest = with_value(NUMBERS, "metadata.name", name)
    return re.sub(r"(?<=: )[\d.e-]+", lambda found: WRITINGS[writing](float(found[0])), json.dumps(manifest))


def stored(plane: ControlPlane, name: str) -> Manifest:
    """The stored job, whose numbers the operator reads as they were written."""
    job = plane.kubectl.get("qlorajob", name)
    assert parse_job(job).spec == READ
    return job


@pytest.mark.parametrize("flags", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_an_apply_of_another_writing_changes_nothing(plane: ControlPlane, flags: tuple[str, ...]) -> None:
    name = f"written-{len(flags)}"
    for writing in WRITINGS:
        plane.kubectl("apply", *flags, "--filename=-", input_text=named(name, writing))
        assert stored(plane, name)["metadata"]["generation"] == 1
        assert plane.kubectl("diff", *flags, "--filename=-", input_text=named(name, writing)) == ""


@pytest.mark.parametrize("output", ["json", "yaml"])
@pytest.mark.parametrize("verb", ["apply", "replace"])
def test_an_export_is_written_back_without_a_change(plane: ControlPlane, verb: str, output: str) -> None:
    name = f"exported-{verb}-{output}"
    plane.kubectl("create", "--save-config", "--filename=-", input_text=named(name))
    exported = plane.kubectl("get", "qlorajob", name, f"--output={output}")
    plane.kubectl(verb, "--filename=-", input_text=exported)
    assert stored(plane, name)["metadata"]["generation"] == 1


def test_another_manager_applies_the_same_numbers_without_a_conflict(plane: ControlPlane) -> None:
    for writing in WRITINGS:
        manager = f"--field-manager={writing}"
        plane.kubectl("apply", "--server-side", manager, "--filename=-", input_text=named("managed", writing))
    assert stored(plane, "managed")["metadata"]["generation"] == 1


@pytest.mark.parametrize("writing", WRITINGS)
def test_a_patch_with_the_same_numbers_changes_no_fixed_field(plane: ControlPlane, writing: str) -> None:
    """The API server gets the patch as it is written. Where 1 is stored, 1.0 raises the generation, and no more."""
    name = f"patched-{writing}"
    plane.kubectl("create", "--filename=-", input_text=named(name))
    plane.kubectl("patch", "qlorajob", name, "--type=merge", f"--patch={named(name, writing)}")
    stored(plane, name)
    other = json.dumps({"spec": {"training": {"learningRate": math.nextafter(1e-7, 1)}}})
    with pytest.raises(ClusterError, match=r"spec\.training cannot be changed"):
        plane.kubectl("patch", "qlorajob", name, "--type=merge", f"--patch={other}")
