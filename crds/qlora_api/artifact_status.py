"""The parts of a status about what a job reads and writes: base, adapter, gate, merged model, report."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from qlora_api.schema import ObservedModel
from qlora_api.spec.gate import MAX_BENCHMARKS, MAX_GUARDS
from qlora_api.spec.output import GgufStatus
from qlora_api.status_types import Bytes, Count, Finite, Share, ShortText, Uri


class BaseStatus(ObservedModel):
    """How prepare got the base model in 4-bit."""

    origin: Literal["downloaded", "cache", "volume"] = Field(
        description="Where it came from: made by this job of what it downloaded, found in the profile's modelCache, "
        "or made of what is on pvc://."
    )
    sha256: str = Field(
        "",
        max_length=64,
        description="SHA-256 over the SHA-256 of each of its files: the same for every job on this model and "
        "quantization with this release, whether it has made the base or found it.",
    )
    uri: Uri | None = Field(
        None, description="Folder of the base published by output.base; not set before, or if it is not published."
    )
    bytes_fetched: Bytes = Field(0, description="Bytes that this job's latest prepare has fetched from the server.")
    seconds: Count = Field(
        0,
        description="Seconds that it took to fetch, check and quantize it, and to wait for another job that makes the "
        "same.",
    )
    message: ShortText = Field(
        "", description="Why the base is not in the cache, or what was wrong with it there; empty if all is well."
    )


class GateCriterion(ObservedModel):
    """One limit of the gate, and what was found."""

    name: ShortText = Field(description="The field of spec.gate.")
    required: Finite = Field(description="Its value.")
    found: Finite = Field(description="Value of the adapter.")
    passed: bool = Field(description="Whether that is enough.")


class MeasuredSet(ObservedModel):
    """The limits for one set of held-out rows, and the score of the answers to it."""

    criteria: tuple[GateCriterion, ...] = Field((), max_length=8, description="The limits that the spec sets.")
    score: Share | None = Field(None, description="Share of the adapter's answers that passed the check.")
    base_score: Share | None = Field(None, description="The same of the base's answers, to the same rows.")
    score_rows: Count | None = Field(None, description="Number of held-out rows that were answered.")
    score_too_long_rows: Count | None = Field(
        None, description="Number of held-out rows that could not be: their prompt has more than 1024 tokens."
    )


class GuardStatus(MeasuredSet):
    """What was measured on the rows of a guard."""

    name: str = Field(max_length=32, description="The guard's name.")
    sha256: str = Field(max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its data.")
    loss: Finite = Field(description="Loss of the adapter.")
    base_loss: Finite = Field(description="Loss of the base, without the adapter.")
    tokens: Count = Field(description="Number of target tokens that both losses are means of.")


class BenchmarkStatus(ObservedModel):
    """The scores of a benchmark."""

    task: str = Field(max_length=64, description="The benchmark's task.")
    metric: str = Field(max_length=64, description="Its metric.")
    score: Share = Field(description="Score of the adapter.")
    base_score: Share = Field(description="Score of the base, without the adapter, on the same rows.")
    rows: Count = Field(description="Number of rows that were answered.")
    criteria: tuple[GateCriterion, ...] = Field((), max_length=2, description="The limits that the spec sets.")


class GateStatus(MeasuredSet):
    """Whether the adapter is good enough to be published, and what was measured."""

    passed: bool = Field(description="Whether every limit of spec.gate is met.")
    adapter_sha256: str = Field(
        max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the adapter that was checked."
    )
    base_sha256: str | None = Field(
        None,
        max_length=64,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the base that it was checked on, as base.sha256.",
    )
    eval_loss: Finite | None = Field(None, description="Held-out loss of the adapter.")
    initial_eval_loss: Finite | None = Field(None, description="Held-out loss before training.")
    eval_tokens: Count | None = Field(
        None,
        description="Number of target tokens that both losses are means of. Not set if the objective compares answers: "
        "they are means over pairs.",
    )
    guards: tuple[GuardStatus, ...] | None = Field(
        None,
        max_length=MAX_GUARDS,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="The results of spec.gate.guards; not set without any.",
    )
    benchmarks: tuple[BenchmarkStatus, ...] | None = Field(
        None,
        max_length=MAX_BENCHMARKS,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["task"]},
        description="The results of spec.gate.benchmarks; not set without any.",
    )
    benchmarks_sha256: str | None = Field(
        None, max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the folder of their tasks."
    )

    @property
    def sets(self) -> Mapping[str, "GateStatus | GuardStatus | BenchmarkStatus"]:
        """All sets of rows by the prefix of their limits in spec.gate, its own first."""
        return {
            "": self,
            **{f"guards[{guard.name}].": guard for guard in self.guards or ()},
            **{f"benchmarks[{benchmark.task}].": benchmark for benchmark in self.benchmarks or ()},
        }


class InitialAdapterStatus(ObservedModel):
    """The adapter at the start of training."""

    source: Uri = Field(description="Its address, with the commit or digest where there is one.")
    sha256: str = Field(
        max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its adapter_model.safetensors."
    )


class AdapterStatus(ObservedModel):
    """The finished adapter."""

    uri: Uri = Field(description="Folder with adapter_model.safetensors and adapter_config.json.")
    sha256: str = Field(max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of adapter_model.safetensors.")
    size_bytes: Bytes = Field(description="Size of adapter_model.safetensors.")
    base_model: Uri = Field(description="The base model, as in the spec.")
    base_revision: ShortText = Field(description="Commit or content digest of the base model.")
    rank: int = Field(ge=1, le=8192, description="LoRA rank, as in the spec.")
    step: Count | None = Field(
        None,
        description="Optimizer steps that it was trained for; with training.keep best, up to the best evaluation.",
    )
    served_rank: int | None = Field(
        None,
        ge=1,
        le=8192,
        description="The smallest --max-lora-rank of vLLM for the adapter, for example 64 for rank 48 "
        "(vLLM's default is 16). Not set if vLLM does not load it.",
    )
    quantization: ShortText = Field(
        description="How the base was quantized in training, for example nf4 with double quantization."
    )
    initial_adapter: InitialAdapterStatus | None = Field(
        None, alias="from", description="The adapter of spec.lora.from; not set without one."
    )
    gguf: GgufStatus | None = Field(None, description="Its GGUF file, if output.gguf is set.")
    lineage: Literal["signed", "unsigned"] | None = Field(
        None,
        description="Whether the statement of what it was made of is signed; not set if the trainer is of a release "
        "that publishes none.",
    )
    remark: ShortText | None = Field(
        None,
        description="Set if the loss has not fallen by a tenth: on the held-out rows, or without them from the first "
        "tenth of the training steps to the last.",
    )


class MergedStatus(ObservedModel):
    """The adapter merged into the dequantized base."""

    uri: Uri = Field(description="Folder of the merged model, in bfloat16.")
    sha256: str = Field(
        max_length=64, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of manifest.json in that folder."
    )
    size_bytes: Bytes = Field(description="Size of its weights.")
    eval_loss: Finite | None = Field(None, description="Loss of the merged model; not set if no rows were held out.")
    adapter_eval_loss: Finite | None = Field(
        None, description="Loss of the adapter on its 4-bit base, on the same held-out rows."
    )
    eval_tokens: Count = Field(0, description="Number of target tokens that both losses are means of.")


class ReportStatus(ObservedModel):
    """The page of the run that is published with the adapter."""

    uri: Uri = Field(description="Its address: that of the adapter, and its name there.")
    sha256: str = Field(max_length=64, pattern=r"^[0-9a-f]{64}$", description="Its SHA-256.")


def published_text(adapter: AdapterStatus | None, merged: MergedStatus | None, base: BaseStatus | None) -> str:
    """State where a job has published, and the remark on its adapter."""
    text = f"the adapter is at {adapter.uri if adapter else ''}"
    text += f", the merged model at {merged.uri}" if merged else ""
    text += f", its base at {base.uri}" if base and base.uri else ""
    if adapter is None or adapter.remark is None:
        return text
    return f"{text}; it {adapter.remark} (gate.minImprovement makes this a failure)"
