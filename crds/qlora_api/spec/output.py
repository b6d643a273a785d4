"""The part of a QLoRAJob's spec about the adapter's destination and formats."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import ObjectName
from qlora_api.schema import ApiModel, ObservedModel, rule, rules
from qlora_api.sources import SCHEMES, WITH_SECRET, FolderAddress, examples, prefixes, scheme_of, series
from qlora_api.spec.model import SecretRef
from qlora_api.spec.training import LoraSpec, TrainingSpec

ANNOUNCEMENTS_LABEL = "qlora.dev/announcements"
"""Label, with the value `true`, of a ConfigMap that the operator may write entries to."""


class AnnounceSpec(ApiModel):
    """A ConfigMap of this namespace that lists finished adapters."""

    config_map: ObjectName = Field(
        description="Name of the ConfigMap, which several jobs may share. It is created if there is none; one that "
        'exists must have the label qlora.dev/announcements: "true". The operator adds the key JOB.json, once, after '
        "success, and removes it when the job is deleted. status.announcement reports it.",
    )


def entry_key(job: str) -> str:
    """Return the key of a job's entry, the file name where the ConfigMap is mounted."""
    return f"{job}.json"


class GgufSpec(ApiModel):
    """The adapter as a GGUF file, in addition to adapter_model.safetensors."""

    type: Literal["f16", "f32", "q8_0"] = Field(
        default="f16",
        description="Type of its numbers: 16 or 32 bits, or 8 with a scale for each 32 (in matrices whose rows are no "
        "multiple of 32, such as those of a smaller rank, f16).",
    )


class GgufStatus(ObservedModel):
    """The adapter's GGUF file."""

    file: str = Field(max_length=256, description="Its name in the adapter's folder.")
    sha256: str = Field(max_length=64, pattern=r"^[0-9a-f]{64}$", description="Its SHA-256.")
    size_bytes: int = Field(ge=0, le=2**53, description="Its size.")
    architecture: str = Field(
        max_length=64, description="llama.cpp's name of the base's architecture; only a GGUF of such a base loads it."
    )


class _Excluded(NamedTuple):
    """A setting that excludes a GGUF file, and the reason."""

    field: str
    absent: str
    """CEL, on the spec: that it is not set."""
    is_set: Callable[[LoraSpec], bool]
    reason: str


_EXCLUDED = (
    _Excluded(
        "lora.useDora",
        "!self.lora.useDora",
        lambda lora: lora.use_dora,
        "llama.cpp knows no magnitudes of DoRA",
    ),
    _Excluded(
        "lora.modulesToSave",
        "!has(self.lora.modulesToSave)",
        lambda lora: lora.modules_to_save is not None,
        "llama.cpp loads no fully trained modules from an adapter",
    ),
)


def gguf_rules() -> list[dict[str, Any]]:
    """The rules of a spec with output.gguf, which `reject_unconvertible` checks too."""
    return [rule(f"!has(self.output.gguf) || {each.absent}", _message(each)) for each in _EXCLUDED]


def reject_unconvertible(gguf: GgufSpec | None, lora: LoraSpec) -> None:
    """Raise ValueError if the job's GGUF file would not give the adapter's answers."""
    if gguf is None:
        return
    for each in _EXCLUDED:
        if each.is_set(lora):
            raise ValueError(_message(each))


def _message(excluded: _Excluded) -> str:
    return f"output.gguf is not possible with {excluded.field}, as {excluded.reason}: remove one of them"


SERVED_TRACKERS = ("mlflow", "wandb")
"""Those of training.reportTo that have servers, to which publish uploads."""
NO_TRACKER = (
    "output.tracking is for the servers of mlflow and wandb: add one of them to training.reportTo, or remove tracking"
)

_RunUrl = Annotated[str, Field(max_length=512)]
_ShortText = Annotated[str, Field(max_length=256)]


class TrackingSecretRef(ApiModel):
    """A Secret in the job's namespace, with the credentials of the trackers' servers."""

    name: ObjectName = Field(
        description="Name of the Secret. Its keys: MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD; WANDB_API_KEY."
    )


class TrackingSpec(ApiModel):
    """How publish uploads the run's history to the servers that the profile names."""

    secret_ref: TrackingSecretRef | None = Field(
        default=None, description="Credentials for these servers. Only publish mounts them, and waits for none."
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$",
        description="MLflow's experiment and the project of Weights & Biases; the job's namespace if not set.",
    )


class TrackedRun(ObservedModel):
    """The run on the server of one tracker."""

    url: _RunUrl | None = Field(None, description="Page of the run; not set if it could not be uploaded.")
    message: _ShortText = Field("", description="Why it could not be uploaded; empty if it was.")


class TrackingStatus(ObservedModel):
    """The run on the servers of the trackers of training.reportTo and the profile."""

    mlflow: TrackedRun | None = Field(None, description="In MLflow.")
    wandb: TrackedRun | None = Field(None, description="In Weights & Biases.")

    @property
    def failures(self) -> dict[str, str]:
        """Why the run could not be uploaded, by tracker."""
        found = {"mlflow": self.mlflow, "wandb": self.wandb}
        return {name: run.message for name, run in found.items() if run is not None and run.url is None}


def tracking_rules() -> list[dict[str, Any]]:
    """The rule for a job's spec."""
    served = " || ".join(f"'{name}' in self.training.reportTo" for name in SERVED_TRACKERS)
    return [rule(f"!has(self.output.tracking) || {served}", NO_TRACKER)]


def reject_untracked(tracking: TrackingSpec | None, training: TrainingSpec) -> None:
    """Raise ValueError for a spec that the rule rejects."""
    if tracking is not None and not set(SERVED_TRACKERS) & set(training.report_to):
        raise ValueError(NO_TRACKER)


class MergedSpec(ApiModel):
    """The adapter merged into the dequantized base, in bfloat16, for any server."""

    destination: FolderAddress | None = Field(
        default=None,
        description="Folder for the merged model, as output.destination; `merged/` in the workspace if not set.",
    )


BaseType = Literal["quantized", "bfloat16"]


class PublishedBaseSpec(ApiModel):
    """The base model that the adapter was trained on, for servers."""

    destination: FolderAddress = Field(
        description="Folder for the base, as output.destination. Jobs that were trained on the same base can name the "
        "same folder: it is written once."
    )
    type: BaseType | None = Field(
        default=None,
        description="Its weights: quantized, the bytes of training in 4-bit, also if not set; or bfloat16, dequantized "
        "from these, for servers without bitsandbytes.",
    )

    @property
    def written_type(self) -> BaseType:
        """The type of the weights that are published."""
        return self.type or "quantized"


_NOTHING_TO_OPEN = f"secretRef is for an {prefixes(WITH_SECRET)} destination: set one, or remove secretRef"
# The field of an address, in CEL whether it is not set, and whose folder it is.
_DESTINATIONS = {
    "destination": ("!has(self.destination)", "adapter"),
    "merged.destination": ("!has(self.merged) || !has(self.merged.destination)", "merged model"),
    "base.destination": ("!has(self.base)", "base"),
}


def _one_in_the_other(one: str, other: str) -> str:
    return f"{_DESTINATIONS[one][1]} and {_DESTINATIONS[other][1]} need separate folders: change {one} or {other}"


def _apart(one: str, other: str) -> dict[str, str]:
    """The rule that neither folder is inside of the other."""
    # An address may end in a slash, and pvc:// loses one on both sides.
    first, second = (f"(self.{field} + '/').replace('//', '/')" for field in (one, other))
    return rule(
        f"{_DESTINATIONS[one][0]} || {_DESTINATIONS[other][0]} || "
        f"!({first}.startsWith({second}) || {second}.startsWith({first}))",
        _one_in_the_other(one, other),
    )


class OutputSpec(ApiModel):
    """Where the adapter is published."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.secretRef) || (has(self.destination) && !self.destination.startsWith('pvc://')) || "
                "(has(self.merged) && has(self.merged.destination) && !self.merged.destination.startsWith('pvc://')) "
                "|| (has(self.base) && !self.base.destination.startsWith('pvc://'))",
                _NOTHING_TO_OPEN,
            ),
            *(_apart(one, other) for one, other in combinations(_DESTINATIONS, 2)),
        )
    )

    destination: FolderAddress | None = Field(
        default=None,
        description=f"Folder for the adapter: {series(examples(*SCHEMES))}; `adapter/` in the workspace if not set. A "
        "repository of a hub is created, private, if there is none.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Credentials for writing to the destination. Publish mounts them, and prepare, which tries them.",
    )
    merged: MergedSpec | None = Field(
        default=None, description="Also publish the adapter merged into the dequantized base; not merged if not set."
    )
    base: PublishedBaseSpec | None = Field(
        default=None,
        description="Also publish the base that the adapter was trained on; not published if not set.",
    )
    report: Literal["full", "withoutSamples", "none"] | None = Field(
        default=None,
        description="The page report.html next to the adapter: without the sample answers, which show rows of the data "
        "(withoutSamples, also if not set), with them (full), or not at all (none). The workspace has it in full.",
    )
    tracking: TrackingSpec | None = Field(
        default=None,
        description="How the history of the run is uploaded to the servers of the trackers in training.reportTo, if "
        "the profile names them.",
    )
    gguf: GgufSpec | None = Field(
        default=None, description="Also publish the adapter as a GGUF file, for llama.cpp and Ollama; none if not set."
    )
    announce: AnnounceSpec | None = Field(
        default=None, description="Announce the finished adapter to servers; not announced if not set."
    )

    @property
    def destinations(self) -> dict[str, str]:
        """The addresses that are set, by their fields: `merged.destination`."""
        found = {
            "destination": self.destination,
            "merged.destination": self.merged.destination if self.merged else None,
            "base.destination": self.base.destination if self.base else None,
        }
        return {field: address for field, address in found.items() if address}

    @property
    def is_outside_workspace(self) -> bool:
        """Whether neither the adapter nor a merged model is left in the workspace."""
        merged_inside = self.merged is not None and self.merged.destination is None
        return self.destination is not None and not merged_inside

    @model_validator(mode="after")
    def _secret_has_a_use(self) -> Self:
        if self.secret_ref and not any(scheme_of(address) in WITH_SECRET for address in self.destinations.values()):
            raise ValueError(_NOTHING_TO_OPEN)
        return self

    def overlap(self, other: "OutputSpec") -> str | None:
        """Return a folder of this job that is in one of the other's, or contains it; None for none.

        Two jobs may publish the same base: it is written once.
        """
        for (field, one), (field_of_other, two) in product(self.destinations.items(), other.destinations.items()):
            is_same_base = field == field_of_other == "base.destination" and one.rstrip("/") == two.rstrip("/")
            if _overlap(one, two) and not is_same_base:
                return one
        return None

    @model_validator(mode="after")
    def _own_folders(self) -> Self:
        for (one, folder), (other, folder_of_other) in combinations(self.destinations.items(), 2):
            if _overlap(folder, folder_of_other):
                raise ValueError(_one_in_the_other(one, other))
        return self


def _overlap(one: str, other: str) -> bool:
    """Whether one folder is the other, or inside of it."""
    first, second = (f"{address.rstrip('/')}/" for address in (one, other))
    return first.startswith(second) or second.startswith(first)
