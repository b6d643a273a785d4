"""Generates the CustomResourceDefinition from the models.

It has a structural schema with CEL rules, columns and defaults.
"""

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel

from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.profile import PROFILE_KIND, PROFILE_PLURAL, Profile
from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.schema import VALIDATIONS, rule, rules
from qlora_api.spec.execution import WorkspaceSpec
from qlora_api.spec.gate import BenchmarkSpec, GuardSpec
from qlora_api.spec.job import (
    GROUP,
    HAS_BENCHMARKS,
    HAS_GUARDS,
    HAS_SCORE,
    KIND,
    MAX_NAME_LENGTH,
    MUTABLE_FIELDS,
    OTHER_JOB_RULE,
    PLURAL,
    POLICY_FIELD,
    REMEDY,
    VERSION,
    QLoRAJobSpec,
)
from qlora_api.spec.training import ResourcesSpec
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.spec import (
    MAX_SWEEP_NAME_LENGTH,
    MUTABLE_SWEEP_FIELDS,
    NAME_WITH_BEST_RULE,
    SWEEP_KIND,
    SWEEP_PLURAL,
    QLoRASweepSpec,
)
from qlora_api.sweep.spec import REMEDY as REMEDY_OF_SWEEP
from qlora_api.sweep.status import QLoRASweepStatus

Schema = dict[str, Any]


def _name_rule(longest: int, of: str) -> dict[str, str]:
    return rule(
        f"self.metadata.name.size() <= {longest} && self.metadata.name.matches('{DNS_LABEL}')",
        f"metadata.name must be one DNS label (a-z, 0-9 and '-', no dots) of at most {longest} characters: "
        f"the names of {of} derive from it",
    )


# Keywords that a structural schema must not have; where they matter, a CEL rule has the same limit.
_DROPPED = frozenset({"title", "propertyNames", "discriminator"})


def _column(name: str, path: str, *, type_: str = "string", wide: bool = False, description: str) -> Schema:
    column: Schema = {"name": name, "type": type_, "jsonPath": path, "description": description}
    return column | ({"priority": 1} if wide else {})


_REASON = _column("Reason", '.status.conditions[?(@.type=="Succeeded")].reason', description="Reason for the phase.")
_COLUMNS = [
    _column("Phase", ".status.phase", description="Phase of the job."),
    _column("Progress", ".status.progress.summary", description="Training steps done."),
    _column("Loss", ".status.progress.loss", type_="number", description="Latest training loss."),
    _column("Remaining", ".status.progress.remaining", description="Time left for training."),
    _column("Model", ".spec.model.source", wide=True, description="The base model."),
    _column("Adapter", ".status.adapter.uri", wide=True, description="Address of the finished adapter."),
    _column("GPU-Hours", ".status.usage.gpuHours", wide=True, description="GPU hours that its train pods have used."),
    _column("Profile", ".spec.scheduling.profileName", wide=True, description="Its QLoRAProfile."),
    _column("GPUs", ".spec.resources.gpus", type_="integer", wide=True, description="GPUs of each train pod."),
    _column("Queue", ".status.queueName", wide=True, description="LocalQueue of its train step."),
    _REASON,
    _column("Age", ".metadata.creationTimestamp", type_="date", description="Time since the job was created."),
]


_SWEEP_COLUMNS = [
    _column("Phase", ".status.phase", description="Phase of the sweep."),
    _column("Cells", ".status.summary", description="Cells that have ended, of all."),
    _column("Best", ".status.best.cell", description="The best cell so far."),
    _column("Eval-Loss", ".status.best.evalLoss", type_="number", description="Loss of that cell on held-out rows."),
    _column(
        "Score", ".status.best.score", type_="number", wide=True, description="Score of that cell, if its gate has one."
    ),
    _column("Changes", ".status.best.overrides", wide=True, description="Changes of that cell to the template."),
    _column("Adapter", ".status.best.adapter", wide=True, description="Address of that cell's adapter."),
    _column("GPU-Hours", ".status.usage.gpuHours", wide=True, description="GPU hours that all cells have used."),
    _REASON,
    _column("Age", ".metadata.creationTimestamp", type_="date", description="Time since the sweep was created."),
]


_PROFILE_COLUMNS = [
    _column(
        "Ready",
        '.status.conditions[?(@.type=="Ready")].status',
        description="Whether jobs can start with it.",
    ),
    _column("Paused", ".spec.paused", type_="boolean", description="Whether its jobs are paused."),
    _column("GPU", ".spec.gpuResource", description="Extended resource that train requests."),
    _column("Image", ".spec.image", wide=True, description="The trainer image."),
    _column(
        "Reason", '.status.conditions[?(@.type=="Ready")].reason', wide=True, description="Why it is ready or not."
    ),
    _column("Age", ".metadata.creationTimestamp", type_="date", description="Time since the profile was created."),
]


def custom_resource_definition() -> Schema:
    """The complete CustomResourceDefinition of QLoRAJob as a plain object."""
    spec = structural_schema(QLoRAJobSpec, defaults=True)
    _fix_spec(spec)
    return _definition(
        KIND,
        PLURAL,
        "qj",
        "QLoRAJob fine-tunes a language model: a frozen 4-bit base, a trained adapter (QLoRA).",
        (_name_rule(MAX_NAME_LENGTH, "the job's pods"), OTHER_JOB_RULE),
        (spec, structural_schema(QLoRAJobStatus, defaults=False)),
        _COLUMNS,
        (".spec.model.source", ".status.phase"),
    )


def sweep_definition() -> Schema:
    """The complete CustomResourceDefinition of QLoRASweep as a plain object."""
    spec = structural_schema(QLoRASweepSpec, defaults=True)
    _fix_fields(spec, QLoRASweepSpec, except_for=MUTABLE_SWEEP_FIELDS, remedy=REMEDY_OF_SWEEP, of="the sweep")
    return _definition(
        SWEEP_KIND,
        SWEEP_PLURAL,
        "qs",
        "QLoRASweep fine-tunes a language model several times, with other numbers each time, and names the best.",
        (_name_rule(MAX_SWEEP_NAME_LENGTH, "its cells"), NAME_WITH_BEST_RULE),
        (spec, structural_schema(QLoRASweepStatus, defaults=False)),
        _SWEEP_COLUMNS,
        (".status.phase",),
    )


def profile_definition() -> Schema:
    """The complete CustomResourceDefinition of QLoRAProfile as a plain object."""
    return _definition(
        PROFILE_KIND,
        PROFILE_PLURAL,
        "qp",
        "QLoRAProfile is a class of QLoRAJobs that the administrator defines: image, nodes, servers, limits.",
        (
            rule(
                f"self.metadata.name.size() <= 63 && self.metadata.name.matches('{DNS_LABEL}')",
                "metadata.name must be one DNS label (a-z, 0-9 and '-', no dots) of at most 63 characters: jobs name "
                "it in spec.scheduling.profileName",
            ),
        ),
        (structural_schema(Profile, defaults=True), structural_schema(QLoRAProfileStatus, defaults=False)),
        _PROFILE_COLUMNS,
        (),
        scope="Cluster",
    )


def definitions() -> dict[str, Schema]:
    """Every CustomResourceDefinition, by its kind."""
    return {
        KIND: custom_resource_definition(),
        SWEEP_KIND: sweep_definition(),
        PROFILE_KIND: profile_definition(),
    }


def _definition(
    kind: str,
    plural: str,
    short_name: str,
    description: str,
    object_rules: tuple[dict[str, str], ...],
    spec_and_status: tuple[Schema, Schema],
    columns: list[Schema],
    selectable: tuple[str, ...],
    *,
    scope: Literal["Namespaced", "Cluster"] = "Namespaced",
) -> Schema:
    spec, status = spec_and_status
    # Until the operator has seen an object, tools that follow kstatus must read it as "in progress".
    status["default"] = {"observedGeneration": -1}
    # One writer owns all of it: the API server then keeps no note of the owner of each field, nor computes one.
    status["x-kubernetes-map-type"] = "atomic"
    root: Schema = {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        **rules(*object_rules),
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
                "categories": ["qlora"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": root},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    **({"selectableFields": [{"jsonPath": path} for path in selectable]} if selectable else {}),
                }
            ],
        },
    }


def _fix_fields(
    schema: Schema,
    model: type[BaseModel],
    *,
    except_for: Collection[str],
    remedy: str,
    path: str = "spec",
    of: str = "the job",
) -> None:
    """Reject a changed, added or removed field of the model, by rules with one message for each field.

    `path`: where the model is. `of`: the object, for people. A rule on the field itself is not evaluated when an
    optional field appears or goes, and one on the parent costs the API server several times as much: for each field
    that a rule reads, it collects all fields of the object again.
    """
    for name, field in model.model_fields.items():
        if name in except_for:
            continue
        key = field.alias or name
        _fix(schema["properties"][key], message := f"{path}.{key} cannot be changed once {of} exists: {remedy}")
        if not field.is_required() and "default" not in schema["properties"][key]:
            _add(schema, rule(f"has(self.{key}) == has(oldSelf.{key})", message))


def _fix_spec(spec: Schema) -> None:
    """Reject changes of what decides the adapter, or is fixed when the job starts."""
    parts = spec["properties"]
    _fix_fields(spec, QLoRAJobSpec, except_for=MUTABLE_FIELDS | {"resources", "workspace"}, remedy=REMEDY)
    taken_back = f"spec.cancel cannot be taken back: {REMEDY}"
    _add(spec, rule("!has(oldSelf.cancel) || !oldSelf.cancel || (has(self.cancel) && self.cancel)", taken_back))
    _fix_fields(parts["resources"], ResourcesSpec, except_for={"memory"}, remedy=REMEDY, path="spec.resources")
    _fix_fields(parts["workspace"], WorkspaceSpec, except_for={POLICY_FIELD}, remedy=REMEDY, path="spec.workspace")
    message = f"spec.gate.score cannot be changed once the job exists, as training measures it: {REMEDY}"
    _fix(parts["gate"]["properties"]["score"], message)
    _add(spec, rule(f"({HAS_SCORE}) == ({HAS_SCORE.replace('self', 'oldSelf')})", message))
    guards, limits = parts["gate"]["properties"]["guards"], {"max_loss_increase", "min_score"}
    _fix_fields(guards["items"], GuardSpec, except_for=limits, remedy=REMEDY, path="spec.gate.guards[]")
    message = f"spec.gate.guards: only limits can be changed once the job exists, as training measures them: {REMEDY}"
    _add(guards["items"], rule("has(self.minScore) == has(oldSelf.minScore)", message))
    same_names = "self.size() == oldSelf.size() && self.all(guard, oldSelf.exists(old, old.name == guard.name))"
    _add(guards, rule(same_names, message))
    _add(spec, rule(f"({HAS_GUARDS}) == ({HAS_GUARDS.replace('self', 'oldSelf')})", message))
    benchmarks, limits = parts["gate"]["properties"]["benchmarks"], {"min_score", "max_drop"}
    _fix_fields(benchmarks["items"], BenchmarkSpec, except_for=limits, remedy=REMEDY, path="spec.gate.benchmarks[]")
    message = (
        f"spec.gate.benchmarks: only limits can be changed once the job exists, as training measures them: {REMEDY}"
    )
    same_tasks = "self.size() == oldSelf.size() && self.all(each, oldSelf.exists(old, old.task == each.task))"
    _add(benchmarks, rule(same_tasks, message))
    _add(spec, rule(f"({HAS_BENCHMARKS}) == ({HAS_BENCHMARKS.replace('self', 'oldSelf')})", message))


def _fix(schema: Schema, message: str) -> None:
    _add(schema, rule("self == oldSelf", message))


def _add(schema: Schema, added: dict[str, str]) -> None:
    schema[VALIDATIONS] = [*schema.get(VALIDATIONS, ()), added]


def structural_schema(model: type[BaseModel], *, defaults: bool) -> Schema:
    """Build the model's JSON schema in Kubernetes' form.

    It has no references, no null, and boolean exclusive bounds. With `defaults`, an object that may be left out
    defaults to `{}`, so that the defaults of its fields apply.
    """
    document = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(document, document.get("$defs", {}), defaults=defaults)


def _structural(node: Schema, definitions: dict[str, Schema], *, defaults: bool) -> Schema:
    node = _merge_alternatives(_resolve(node, definitions), definitions)
    result: Schema = {}
    for key, value in node.items():
        if key in _DROPPED or key == "$defs" or (key == "additionalProperties" and isinstance(value, bool)):
            continue
        if key == "default":
            if defaults and value is not None:
                result["default"] = {} if node.get("type") == "object" else value
        elif key == "properties":
            result[key] = {name: _structural(child, definitions, defaults=defaults) for name, child in value.items()}
        elif key in ("items", "additionalProperties"):
            result[key] = _structural(value, definitions, defaults=defaults)
        elif key == "description":
            result[key] = _one_line_per_paragraph(value) + (default_sentence(node.get("default")) if defaults else "")
        elif key == "const":
            result["enum"] = [value]
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            result[key.replace("exclusiveM", "m")] = value
            result[key] = True
        else:
            result[key] = value
    if "type" in result and "format" not in result:
        number_format = {"integer": "int64", "number": "double"}.get(result["type"])
        result |= {"format": number_format} if number_format else {}
    return result


def default_sentence(default: object) -> str:
    """Return the default at the end of a description, empty without one.

    `kubectl explain` does not show defaults.
    """
    if default in (None, "", [], {}) or isinstance(default, dict):
        return ""
    return f" Default: {default if isinstance(default, str) else json.dumps(default)}."


def _one_line_per_paragraph(text: str) -> str:
    """Drop a docstring's line breaks, which `kubectl explain` would show."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Replace the node's reference by its target; keywords of the node win."""
    if "$ref" not in node:
        return node
    name = node["$ref"].rpartition("/")[2]
    return _resolve(definitions[name], definitions) | {key: value for key, value in node.items() if key != "$ref"}


def _merge_alternatives(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Reduce `X | None` to X: a field that is not set is absent, never null.

    Raises TypeError for any other union.
    """
    if "anyOf" not in node:
        return node
    options = [option for option in node["anyOf"] if option.get("type") != "null"]
    if len(options) != 1:
        raise TypeError(f"a union of {len(options)} types has no structural schema: {node}")
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return _resolve(options[0], definitions) | rest
