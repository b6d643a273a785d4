"""The generated CustomResourceDefinitions: in step with the models, structural, bounded, described."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.crd import custom_resource_definition, definitions, structural_schema
from qlora_api.profile import PROFILE_KIND
from qlora_api.schema import ApiModel
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import HELD_OUT, open_settings
from tests.support.manifests import MINIMAL

ROOT = Path(__file__).parents[3]
DEFINITION = custom_resource_definition()
SCHEMA = DEFINITION["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "crds" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def fields(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of every kind."""
    for kind, definition in definitions().items():
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        yield from nodes(schema["properties"][part], f"{kind}.{part}")


WRITTEN_BY_USERS = list(fields("spec"))
ALL = WRITTEN_BY_USERS + list(fields("status"))


def test_committed_copies_match_make_generate() -> None:
    rendered = generate().render()
    assert len(rendered) == 6
    assert [path for path, text in rendered.items() if path.read_text() != text] == [], "run `make generate`"
    assert all(yaml.safe_load(text) in definitions().values() for text in set(rendered.values()))


@pytest.mark.parametrize(("path", "node"), ALL, ids=[path for path, _ in ALL])
def test_every_field_is_structural_and_bounded(path: str, node: dict[str, Any]) -> None:
    foreign = {"$ref", "anyOf", "oneOf", "allOf", "title", "const", "nullable", "propertyNames", "patternProperties"}
    assert not node.keys() & (foreign | {"$defs"})
    match node["type"]:
        case "string":
            assert node.keys() & {"maxLength", "enum"}, "a string without a bound makes CEL rules too expensive"
        case "array":
            assert "maxItems" in node
        case "integer":
            assert node["maximum"] <= 2**53
            assert "minimum" in node
        case "object":
            assert "properties" in node or "maxProperties" in node


@pytest.mark.parametrize(("path", "node"), WRITTEN_BY_USERS, ids=[path for path, _ in WRITTEN_BY_USERS])
def test_kubectl_explain_has_a_description_of_every_field(path: str, node: dict[str, Any]) -> None:
    if path.endswith(("[]", "{}")) and node["type"] != "object":
        return
    assert len(node["description"]) > 10
    assert node["description"].endswith(".")


def test_optional_objects_default_to_empty_so_that_their_fields_get_theirs() -> None:
    training = SCHEMA["properties"]["spec"]["properties"]["training"]
    assert training["default"] == {}
    assert training["properties"]["maxGradNorm"]["default"] == 0.3


@pytest.mark.parametrize("path", sorted(open_settings(QLoRAJobSpec.model_validate(MINIMAL["spec"])) - {HELD_OUT}))
def test_an_automatic_setting_has_no_default_and_its_description_has_the_rule(path: str) -> None:
    part, _, name = path.partition(".")
    schema = SCHEMA["properties"]["spec"]["properties"][part]["properties"][name]
    assert "default" not in schema
    assert "Automatic: " in schema["description"]


def test_a_job_without_a_status_reads_as_in_progress() -> None:
    assert SCHEMA["properties"]["status"]["default"] == {"observedGeneration": -1}


def test_jobs_can_be_selected_by_model_and_by_phase() -> None:
    """`kubectl get qlorajobs --field-selector status.phase=Failed`."""
    (version,) = DEFINITION["spec"]["versions"]
    assert [field["jsonPath"] for field in version["selectableFields"]] == [".spec.model.source", ".status.phase"]


def test_exclusive_bounds_take_the_boolean_form() -> None:
    rate = SCHEMA["properties"]["spec"]["properties"]["training"]["properties"]["learningRate"]
    assert (rate["minimum"], rate["exclusiveMinimum"], rate["maximum"]) == (0, True, 1)


def test_every_field_but_the_mutable_ones_has_a_transition_rule() -> None:
    spec = SCHEMA["properties"]["spec"]
    mutable = {
        "suspend",
        "cancel",
        "activeDeadlineSeconds",
        "progressDeadlineSeconds",
        "cleanupAfterSeconds",
        "ttlSecondsAfterFinished",
        "retry",
        "gate",
        "budget",
    }
    parts = {"resources": {"memory"}, "workspace": {"persistentVolumeClaimRetentionPolicy"}}
    assert _changeable(spec) == mutable | set(parts)
    assert {part: _changeable(spec["properties"][part]) for part in parts} == parts
    assert "score" not in _changeable(spec["properties"]["gate"])


def _changeable(schema: dict[str, Any]) -> set[str]:
    """Return the fields whose value may change."""
    kept = {name for name, field in schema["properties"].items() if "self == oldSelf" in _expressions(field)}
    sure = {*schema.get("required", ()), *(name for name in kept if "default" in schema["properties"][name])}
    appear = {name for name in kept if f"has(self.{name}) == has(oldSelf.{name})" in _expressions(schema)}
    assert kept - sure - appear <= {"score"}, "the rule about the existence of gate.score is one of the spec"
    return set(schema["properties"]) - kept


def _expressions(schema: dict[str, Any]) -> list[str]:
    return [entry["rule"] for entry in schema.get(RULES, ())]


RULES = "x-kubernetes-validations"


def test_a_union_of_two_types_is_rejected() -> None:
    class Ambiguous(ApiModel):
        value: int | str

    with pytest.raises(TypeError, match="no structural schema"):
        structural_schema(Ambiguous, defaults=True)


def test_no_field_names_another_namespace_or_carries_pod_internals() -> None:
    of_tenants = (path for path, _ in WRITTEN_BY_USERS if not path.startswith(PROFILE_KIND))
    names = {path.rpartition(".")[2].lower() for path in of_tenants}
    assert not names & {
        "namespace",
        "env",
        "envfrom",
        "image",
        "command",
        "args",
        "volumes",
        "podtemplate",
        "securitycontext",
    }
