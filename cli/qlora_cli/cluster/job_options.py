"""The options of `qlora submit` for a job without a file, and their manifest."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
from pydantic import ValidationError

from qlora_api.problems import explain
from qlora_api.spec.job import API_VERSION, KIND, QLoRAJobDocument
from qlora_client.jobs.names import generated_name

Object = dict[str, Any]


class _Option(NamedTuple):
    """An option, and the field below spec that it sets."""

    name: str
    field: str
    kind: type
    help: str
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """Its name as a parameter of the command."""
        return _parameter(self.name)


# Fields that most jobs set. Any other field takes a file, which `--dry-run=client -o yaml` begins.
_OPTIONS = (
    _Option("--model", "model.source", str, "Base model: hf://ORG/NAME, pvc://CLAIM/PATH, s3:// or oci://.", "ADDRESS"),
    _Option("--revision", "model.revision", str, "Branch, tag or commit of an hf:// model."),
    _Option("--model-token", "model.tokenSecretRef.name", str, "Secret with the Hub's token, key `token`.", "SECRET"),
    _Option("--data", "dataset.source", str, "Data set: hf://, pvc://, s3:// or configMap://NAME/KEY.", "ADDRESS"),
    _Option("--eval-fraction", "dataset.eval.fraction", float, "Share of the rows that is held out."),
    _Option("--rank", "lora.rank", int, "LoRA rank."),
    _Option("--alpha", "lora.alpha", int, "LoRA alpha."),
    _Option("--epochs", "training.epochs", int, "Passes over the data."),
    _Option("--max-steps", "training.maxSteps", int, "Optimizer steps, instead of epochs."),
    _Option("--learning-rate", "training.learningRate", float, "Learning rate."),
    _Option(
        "--learning-rate-multiplier",
        "training.learningRateMultiplier",
        float,
        "Factor of the automatic learning rate, instead of --learning-rate.",
    ),
    _Option(
        "--batch-size", "training.batchSize", int, "Rows in an optimizer step, instead of gradient accumulation steps."
    ),
    _Option("--micro-batch-size", "training.microBatchSize", int, "Sequences in a forward pass."),
    _Option(
        "--gradient-accumulation-steps",
        "training.gradientAccumulationSteps",
        int,
        "Forward passes in an optimizer step.",
    ),
    _Option("--max-sequence-length", "training.maxSequenceLength", int, "Tokens in a sequence."),
    _Option(
        "--destination", "output.destination", str, "Destination of the adapter; its workspace if not set.", "ADDRESS"
    ),
    _Option(
        "--destination-secret",
        "output.secretRef.name",
        str,
        "Secret with the credentials of the destination.",
        "SECRET",
    ),
    _Option("--gpus", "resources.gpus", int, "GPUs."),
    _Option(
        "--gpu-memory",
        "resources.gpuMemory",
        str,
        "Memory of each GPU, for example 24Gi, for the check that the job fits.",
        "MEMORY",
    ),
    _Option("--profile", "scheduling.profileName", str, "The QLoRAProfile."),
    _Option("--queue", "scheduling.queueName", str, "LocalQueue of Kueue."),
)
_REQUIRED = ("--model", "--data")


class OptionError(Exception):
    """The options describe no valid job. The message names the allowed values."""


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command; it gets `name` and the value of each, or None."""
    for option in reversed(_OPTIONS):
        command = click.option(option.name, type=option.kind, metavar=option.metavar, help=option.help)(command)
    return click.option("--name", help="Name of the job; made of the model's name if not set.")(command)


def given(values: Mapping[str, Any]) -> list[str]:
    """The options of the parameters that are set."""
    return [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None]


def job_of(name: str | None, values: Mapping[str, Any], suffix: str) -> Object:
    """The manifest, after the schema's checks. `suffix` makes a generated name unique.

    Raises OptionError.
    """
    missing = [option for option in _REQUIRED if values[_parameter(option)] is None]
    if missing:
        raise OptionError(f"missing {' and '.join(missing)}: name them, or the FILE of a whole job")
    spec: Object = {}
    for option in _OPTIONS:
        if (value := values[option.parameter]) is not None:
            _set(spec, option.field, value)
    name = name or generated_name(values["model"], suffix)
    body: Object = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}
    try:
        QLoRAJobDocument.model_validate(body, by_alias=True, by_name=False)
    except ValidationError as error:
        raise OptionError(_describe(error)) from error
    return body


def _parameter(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _set(spec: Object, field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        spec = spec.setdefault(parent, {})
    spec[last] = value


def _describe(error: ValidationError) -> str:
    """The first problem, in terms of the option that has caused it."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    options = {f"spec.{option.field}": option.name for option in _OPTIONS} | {"metadata.name": "--name"}
    return f"{options.get(field, field)}: {explain(problem, QLoRAJobDocument)}"
