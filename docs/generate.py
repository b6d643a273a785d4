"""Writes the reference pages of the documentation from what they describe; run by `make generate`."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml
from prometheus_client import CollectorRegistry

from docs import python_reference, trainer_image
from docs.markdown import ELSEWHERE, Schema, default, default_of, description_of, lines, page, table, type_of
from qlora_api.contract import TIGHT_EXIT_CODE, ExitCode
from qlora_api.crd import custom_resource_definition, profile_definition, sweep_definition
from qlora_api.spec.job import API_VERSION, MUTABLE_FIELDS
from qlora_api.sweep.spec import MUTABLE_SWEEP_FIELDS
from qlora_api.usage import LostGpuTime, UsageStatus
from qlora_cli.__main__ import main as qlora
from qlora_door.metrics import RequestMetrics
from qlora_operator.metrics.jobs import DEFAULT_RUNNING_JOBS, SERIES_PER_RUNNING_JOB
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.metrics.shown import ENDED, FAILURE_REASONS, PHASES, TRAINING
from qlora_operator.metrics.sweeps import SWEEP_PHASES
from qlora_operator.metrics.transitions import DEFAULT_NAMESPACES, OTHER_NAMESPACES, PHASE_BUCKETS

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
DECISIONS = ROOT / "docs" / "decisions"
DECISION_GROUPS = ("Architecture", "API", "Security", "Numerics", "Operations")
# Fields below spec that most jobs set, in the order of the page.
MOST_JOBS = (
    "model.source",
    "model.tokenSecretRef",
    "dataset.source",
    "dataset.eval",
    "output.destination",
    "resources.gpuMemory",
)
VALUES = ROOT / "helm" / "qlora-operator" / "values.yaml"


def pages() -> dict[Path, str]:
    """Every generated page: its file, and its text in Markdown."""
    texts = {
        "resource.md": _resource(),
        "sweep.md": _sweep(),
        "profile.md": _profile(),
        "chart.md": _chart(),
        "cli.md": _command_line(),
        "python.md": _python(),
        "metrics.md": _metrics(),
        "exit-codes.md": _exit_codes(),
    }
    index = {DECISIONS / "index.md": _decisions()}
    return {REFERENCE / name: text for name, text in texts.items()} | index | trainer_image.pages()


def _resource() -> str:
    mutable = ", ".join(f"`spec.{_camel(name)}`" for name in sorted(MUTABLE_FIELDS))
    definition = custom_resource_definition()
    return _kind(
        definition,
        f"Once a job exists, only {mutable} and `spec.resources.memory` can be changed.",
        "## Fields of most jobs",
        table(("Field", "Meaning"), map(partial(_field, definition), MOST_JOBS)),
        "All other fields are advanced: their defaults fit most jobs, and `prepare` chooses "
        "[those that are automatic](../how-to/training-settings.md).",
    )


def _field(definition: Schema, path: str) -> tuple[str, str]:
    """The row of a field below spec."""
    schema: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    *parents, name = path.split(".")
    for parent in parents:
        schema = schema["properties"][parent]
    field = schema["properties"][name]
    required = name in schema.get("required", ())
    return lines(f"`spec.{path}`", type_of(field, f"spec.{path}"), default(field, required)), description_of(field)


def _sweep() -> str:
    mutable = " and ".join(f"`spec.{_camel(name)}`" for name in sorted(MUTABLE_SWEEP_FIELDS))
    return _kind(sweep_definition(), f"Once a sweep exists, only {mutable} can be changed.")


def _profile() -> str:
    return _kind(
        profile_definition(),
        "[Profiles](../concepts/profiles.md) has examples. Any field can be changed at any time: a job keeps the copy "
        "that it has started with.",
    )


def _kind(definition: Schema, *introduction: str) -> str:
    names, version = definition["spec"]["names"], definition["spec"]["versions"][0]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    columns = [
        (f"`{column['name']}`", column["description"], "with `-o wide`" if column.get("priority") else "always")
        for column in version["additionalPrinterColumns"]
    ]
    return page(
        names["kind"],
        "`crds/qlora_api`",
        f"`apiVersion: {API_VERSION}`, `kind: {names['kind']}`, short name `{names['shortNames'][0]}`. "
        f"`kubectl explain {names['singular']}.spec` prints the same text.",
        *introduction,
        "## Columns of `kubectl get`",
        table(("Column", "Meaning", "Shown"), columns),
        "## What you write",
        *_objects(properties["spec"], "spec", level=3),
        "## What the operator reports",
        *_objects(properties["status"], "status", level=3),
    )


def _chart() -> str:
    return page(
        "Chart values",
        "`helm/qlora-operator/values.yaml`",
        "`helm show values helm/qlora-operator` prints the same defaults. Installing or upgrading the chart fails if a "
        "value is unknown.",
        "## Values",
        table(("Value", "Meaning"), _values()),
        "Each entry of `profiles` is the spec of a [QLoRAProfile](profile.md). A field that it does not set is taken "
        "from `profiles.default`.",
    )


def _values() -> Iterator[tuple[str, str]]:
    """Return each value that a `# --` comment explains: path, default and comment."""
    values = yaml.safe_load(VALUES.read_text())
    path: list[str] = []
    comment: list[str] = []
    for line in VALUES.read_text().splitlines():
        text = line.strip()
        if text.startswith("# --"):
            comment = [text.removeprefix("# --").strip()]
        elif text.startswith("#"):
            comment += [text.removeprefix("#").strip()] if comment else []
        elif match := re.match(r"( *)(\w+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment:
                yield lines(f"`{'.'.join(path)}`", default_of(_at(values, path))), " ".join(comment)
            comment = []


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def _command_line() -> str:
    sections: list[str] = []
    program = click.Context(qlora)
    for name in qlora.list_commands(program):
        command = qlora.get_command(program, name)
        if command is None:
            raise LookupError(name)
        context = click.Context(command, info_name=f"qlora {name}")
        options = [_option(parameter, context) for parameter in command.params if isinstance(parameter, click.Option)]
        sections += [
            f"## qlora {name}",
            f"```\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```",
            *_paragraphs(command.help or ""),
            table(("Option", "Meaning"), options),
        ]
    return page(
        "Command line",
        "`cli/qlora_cli`",
        "`pip install '.[cli,client,trainer]'` in a checkout installs `qlora`, also as a "
        "[plugin of kubectl](../how-to/command-line.md). `plan`, `data` and `run` need no cluster, and the extra "
        "`trainer`; the others ask a cluster, with the extra `client`. `adapter`, `report` and `verify` take `stores` "
        "for what is on the Hub, in a bucket or in a registry. Exit codes are [those of the "
        "steps](exit-codes.md), or 1 for what a cluster denies, rejects or does not have.",
        *sections,
    )


def _python() -> str:
    return page(
        "Python client",
        "the docstrings of `cli/qlora_client`",
        "`pip install '.[client]'` in a checkout installs it, and [Use the Python client](../how-to/python-client.md) "
        "shows how. The models of a job, which `train` and `plan` take, are those of `qlora_api`: a class for each "
        "object of the [QLoRAJob](resource.md), with the fields' names in snake_case.",
        *python_reference.blocks(),
    )


def _option(option: click.Option, context: click.Context) -> tuple[str, str]:
    record = option.get_help_record(context)
    if record is None:
        return "", ""
    usage, meaning = record
    return f"`{usage.replace('|', ' or ')}`", meaning.replace("<", "&lt;")


def _metrics() -> str:
    metrics, of_the_door = Metrics(), CollectorRegistry()
    _show_labels(metrics)
    RequestMetrics(of_the_door).observe("GET", "/v1/models", 200, 0)
    columns = ("Metric", "Meaning")
    return page(
        "Metrics",
        "`operator/qlora_operator/metrics/metrics.py` and its parts, and `door/qlora_door/metrics.py`",
        "The operator serves them in Prometheus' format on `/metrics`, port 9090 of its pod. `metrics.service` and "
        "`metrics.serviceMonitor` in the [chart's values](chart.md) make them reachable. "
        "[Watch the jobs and the operator](../how-to/monitoring.md) has dashboards, alerts, and access.",
        table(columns, _families(metrics.registry)),
        "## Number of series",
        "\n".join(f"- {sentence}" for sentence in _cardinality()),
        "## Of the door",
        "[The door](../how-to/openai.md) has its own on port 9090 of its pods.",
        table(columns, _families(of_the_door)),
    )


def _families(registry: CollectorRegistry) -> list[tuple[str, str]]:
    """Return name with labels, and meaning, of each metric."""
    rows = []
    for family in registry.collect():
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labelled = (
            f"{family.type}, {'labels' if len(labels) > 1 else 'label'} {', '.join(f'`{label}`' for label in labels)}"
            if labels
            else family.type
        )
        rows.append((lines(f"`{name}`", labelled), family.documentation))
    return rows


def _show_labels(metrics: Metrics) -> None:
    """Give each metric a series with its labels: those without a value show none."""
    metrics.namespace_is_denied("", False)
    metrics.sweeps.show(("", ""), {})
    metrics.gpu_seconds.add("", "", UsageStatus())
    metrics.requests.observe("GET", "/", None, 0)
    metrics.watches.event("", "")
    step = {"progressedAt": "2026-01-02T03:04:05Z"}
    figures = {figure.path[-1]: 1 for figure in TRAINING}
    for phase in ("Queued", "Training", "Failed"):
        metadata = {"namespace": "", "name": phase, "uid": phase}
        status = {"phase": phase, "phaseSince": "2026-01-02T03:04:05Z", "step": step, "progress": figures}
        metrics.jobs.show({"metadata": metadata, "spec": {}, "status": status})
    changes = metrics.transitions
    for metric in (changes.failures, changes.ended, changes.phase_duration, changes.first_step):
        metric.labels(*("" for _ in metric._labelnames))


def _cardinality() -> Iterator[str]:
    """The bound of the number of series."""
    yield (
        f"Metrics with the label `name` are those of one running job: {SERIES_PER_RUNNING_JOB} series at most while it "
        "prepares, trains or publishes, and none when it waits, is suspended or has ended. At most "
        f"`settings.metrics.runningJobs` ({DEFAULT_RUNNING_JOBS} by default) jobs have them; `qlora_jobs_left_out` "
        "counts running jobs beyond that."
    )
    yield (
        f"`qlora_jobs` has {len(PHASES)} series for each namespace with a job, and `qlora_sweeps` {len(SWEEP_PHASES)} "
        "for each with a sweep."
    )
    yield (
        f"`qlora_job_failures_total` has {len(FAILURE_REASONS) + 1} for each profile: the reasons of "
        "[Troubleshooting](../how-to/troubleshooting.md), and `Other`. `qlora_jobs_failed` has at most as many for "
        "each namespace, of those reasons that its failed jobs have."
    )
    histogram, left = len(PHASE_BUCKETS) + 3, len(PHASES) - len(ENDED)
    yield (
        f"`qlora_job_phase_duration_seconds` has {histogram} for each namespace, profile and phase that jobs left: "
        f"at most {histogram * left} for each namespace and profile. `qlora_job_time_to_first_step_seconds` has "
        f"{2 * histogram} of these. At most `settings.metrics.namespaces` ({DEFAULT_NAMESPACES} by default) namespaces "
        f"are labels of both, those whose jobs change first after the operator's start; the rest are "
        f"`{OTHER_NAMESPACES}`."
    )
    yield (
        "`qlora_gpu_seconds_total` has one for each namespace and profile whose jobs request GPUs, and "
        f"`qlora_gpu_lost_seconds_total` {len(LostGpuTime.model_fields)}."
    )
    yield (
        "A tenant chooses the names of a job, its profile and its claim. They are labels of the job while it runs, and "
        "make no other series: in counters and histograms a profile that does not exist is `unknown`."
    )
    yield ("A standby operator has no series of jobs. Counters start at 0 in each process: use `rate` or `increase`.")


def _exit_codes() -> str:
    def retried(code: ExitCode) -> str:
        if code is ExitCode.DONE:
            return "not needed"
        if code is ExitCode.PEERS_MISSING:
            return "until all nodes start"
        if code in (ExitCode.INTERRUPTED, ExitCode.PEER_LOST):
            return "up to `retry.maxDisruptions` times"
        return "never" if code.permanent else "up to `retry.maxFailures` times"

    rows = [(str(int(code)), f"`{code.reason}`", retried(code)) for code in ExitCode]
    return page(
        "Exit codes",
        "`crds/qlora_api/contract.py`",
        "A step exits with one of these codes, in a pod and with `qlora run`. The job's conditions and Events have the "
        "reason; [Troubleshooting](../how-to/troubleshooting.md) has the remedy for each.",
        table(("Code", "Reason", "Retried"), rows),
        "If you stop `qlora run`, it exits with 128 + the signal's number: 130 after Ctrl-C.",
        f"`qlora plan` exits with {int(ExitCode.DOES_NOT_FIT)} for the verdict `exceeds`, with {TIGHT_EXIT_CODE} for "
        "`tight` (the run may run out of memory), and with 0 for `fits` or if the verdict is unknown. For a model that "
        "`prepare` rejects, it exits with the code of `prepare`.",
    )


def _decisions() -> str:
    """Index decision records by group. Raises ValueError for an incomplete one."""
    groups: dict[str, list[str]] = {group: [] for group in DECISION_GROUPS}
    for record in sorted(DECISIONS.glob("0*.md")):
        head = re.match(r"# (\d+)\. (.+)\n\nGroup: (\w+) · Date: \d{4}-\d\d-\d\d\n", record.read_text())
        if head is None or head[3] not in groups:
            raise ValueError(
                f"docs/decisions/{record.name} must begin with `# NUMBER. TITLE` and `Group: GROUP · "
                f"Date: YYYY-MM-DD`, where GROUP is one of {', '.join(groups)}"
            )
        groups[head[3]].append(f"- [{head[1]}. {head[2]}]({record.name})")
    return page(
        "Decisions",
        "the records in this folder",
        "Each record has a decision that is costly to reverse, and the alternatives that a competent engineer would "
        "choose.",
        *(block for group, lines in groups.items() for block in (f"## {group}", "\n".join(lines))),
    )


def _objects(schema: Schema, path: str, level: int, defaults: Schema | None = None) -> Iterator[str]:
    """A section for the object and one for each object below it: description, fields, rules.

    `defaults`: the object's default in its parent, which wins over the defaults of its fields.
    """
    required = set(schema.get("required", ()))
    fields: dict[str, Schema] = {
        name: {**field, "default": (defaults or {}).get(name, field.get("default"))}
        for name, field in schema["properties"].items()
    }
    yield f"{'#' * level} `{path}`"
    if description := schema.get("description"):
        yield description
    rows = [
        (
            lines(f"`{name}`", type_of(field, f"{path}.{name}"), default(field, name in required)),
            description_of(field),
        )
        for name, field in fields.items()
    ]
    yield table(("Field", "Meaning"), rows)
    messages = [rule["message"] for rule in schema.get("x-kubernetes-validations", ())]
    if rules := [message for message in messages if "cannot be changed once the " not in message]:
        yield "Rules:"
        yield "\n".join(f"- {message}" for message in rules)
    for name, field in fields.items():
        if f"{path}.{name}" in ELSEWHERE:
            continue
        if "properties" in field:
            yield from _objects(field, f"{path}.{name}", min(level + 1, 4), field["default"])
        elif "properties" in field.get("items", ()):
            yield from _objects(field["items"], f"{path}.{name}", min(level + 1, 4))


def _inline(node: Any, schemas: Mapping[str, Any]) -> Any:
    """Inline each reference of the schema, and drop `null` from its unions."""
    if isinstance(node, list):
        return [_inline(item, schemas) for item in node]
    if not isinstance(node, dict):
        return node
    parts = [part for part in node.get("anyOf", ()) if part.get("type") != "null"]
    if "anyOf" in node and len(parts) == 1:
        rest = {key: value for key, value in node.items() if key != "anyOf" and value is not None}
        return _inline({**parts[0], **rest}, schemas)
    if "$ref" in node:
        target = schemas[node["$ref"].rpartition("/")[2]]
        return _inline({**target, **{key: value for key, value in node.items() if key != "$ref"}}, schemas)
    return {key: _inline(value, schemas) for key, value in node.items()}


def _paragraphs(text: str) -> Iterator[str]:
    yield from (" ".join(part.split()) for part in text.split("\n\n"))


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def main() -> None:
    """Write every page."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
