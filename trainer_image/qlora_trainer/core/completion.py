"""The completion records that make a step idempotent, and inform the next one."""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, PositiveInt, ValidationError

from qlora_api.artifact_status import AdapterStatus, BaseStatus, GateStatus, InitialAdapterStatus, MergedStatus
from qlora_api.choice import Choice
from qlora_api.memory.training_shape import Recomputation
from qlora_api.schema import Decides, ObservedModel
from qlora_api.spec.gate import BenchmarkSpec, GateSpec, ScoreSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.output import TrackingStatus
from qlora_api.spec.resolved import ResolvedSpec, open_settings, resolve
from qlora_api.status import Count, DatasetStatus, MemoryStatus, Share, Timestamp
from qlora_api.usage import WorkStatus
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.measured_memory import MeasuredMemory


class EndOfTurn(ObservedModel):
    """The mark that ends a model's answers, where no server stops by default."""

    text: str = Field(description="Empty if nothing follows an answer.")
    token: int | None = Field(None, description="Its id, if it is one token.")
    known: tuple[int, ...] = Field((), description="Tokens where a server stops by default.")

    @property
    def request_field(self) -> str:
        """The JSON field, without braces, that makes an OpenAI-compatible server stop."""
        # A server searches for texts in its visible output, which has no special tokens.
        if self.token is not None:
            return f'"stop_token_ids": [{self.token}]'
        return f'"stop": {json.dumps([self.text], ensure_ascii=False)}'


class PreparedModel(ObservedModel):
    """The part of the record of prepare that the model's small files decide."""

    target_modules: tuple[str, ...] = Field(description="Exact names of the linear layers that get an adapter.")
    packed: bool = Field(description="Whether a sequence may hold several rows.")
    rows_apart: bool = Field(False, description="Whether a micro batch may hold several rows.")
    mixture_of_experts: bool = Field(False, description="Whether the base has routed experts, which are in 4-bit too.")
    experts_in_mxfp4: bool = Field(False, description="Whether these are in MXFP4, as they were published.")
    model_type: str
    auto_class: str = Field("AutoModelForCausalLM", description="The one of transformers that loads the whole model.")
    attention: str | None = Field(None, description="transformers' attention that the model needs; not set for ours.")
    fixed_positions: int | None = Field(
        None,
        description="Tokens of the longest row that the model computes at all; not set if it computes longer ones than "
        "it has positions for.",
    )
    memory: MemoryStatus
    measured: MeasuredMemory | None = Field(
        None, description="The dry runs that the estimate is from; not set if they failed, or by an earlier release."
    )
    recomputed_blocks: Count | None = Field(
        None, description="Blocks, from the first, that training.gradientCheckpointing recomputes; not set for all."
    )
    offloads_inputs: bool = Field(False, description="Whether their inputs are held in host memory, if it is all.")

    @property
    def recomputation(self) -> Recomputation:
        """The blocks that training.gradientCheckpointing recomputes."""
        return Recomputation(self.recomputed_blocks, self.offloads_inputs)


class PreparedBase(ObservedModel):
    """The part of the record of prepare about the model's files and its base in 4-bit."""

    model_path: str = Field(description="Folder of config.json and tokenizer, and of weights that are kept.")
    model_revision: str = Field(description="Commit, or sha256:… of the content for a model on a volume.")
    base_path: str = Field(description="Folder of the base model in 4-bit, as transformers loads it.")
    base_sha256: str = Field(description="SHA-256 over the SHA-256 of each of its files.")
    base: BaseStatus | None = Field(None, description="How the model was got; not set by an earlier release.")


class PreparedData(ObservedModel):
    """The part of the record of prepare about the data set and its sequences."""

    fingerprint: str = Field(description="SHA-256 of everything that determines the prepared data and the model.")
    data_path: str = Field(description="Folder of the packed sequences.")
    data_content: Mapping[str, object] | None = Field(
        None,
        description="Everything besides the settings of model, adapter and training that decides the sequences, "
        "whatever its address: runs are compared by it. Not set by an earlier release.",
    )
    dataset: DatasetStatus
    guards: Mapping[str, str] = Field({}, description="SHA-256 of the data of each guard of spec.gate, by its name.")
    work: WorkStatus | None = Field(
        None, description="The amount of computation; not set if that is unknown, or by an earlier release."
    )
    template_sha256: str | None = Field(
        None, description="SHA-256 of the job's chat template, stored with the sequences; not set without one."
    )
    end_of_turn: EndOfTurn | None = Field(
        None, description="The end of an answer, if no server of the model stops there by default."
    )


class PrepareRecord(PreparedModel, PreparedBase, PreparedData):
    """The result of prepare. Paths below the workspace are relative to it."""

    remarks: tuple[str, ...] = Field((), description="Remarks for the user, such as deviations from the spec.")
    total_steps: int | None = Field(None, description="Optimizer steps planned; not set by an earlier release.")
    settings: tuple[Choice, ...] = Field((), description="The settings that the job leaves open, as chosen.")
    asked: str = Field("", description="SHA-256 of the parts of the spec that these follow; empty without any.")
    initial_adapter: InitialAdapterStatus | None = Field(
        None, description="The adapter of spec.lora.from, which is in the workspace; not set without one."
    )
    continued_step: int | None = Field(
        None, description="Optimizer steps of the run that spec.continues resumes; not set without it."
    )

    def resolve(self, spec: QLoRAJobSpec) -> ResolvedSpec:
        """Return the spec with the chosen settings. Raises StepFailure if these are of another spec."""
        try:
            return resolve(spec, self.settings)
        except ValidationError as error:
            raise bad_configuration(
                "the workspace is prepared for other settings than the spec's: run the prepare step again"
            ) from error


def asked_sha256(spec: QLoRAJobSpec) -> str:
    """SHA-256 of the parts of a spec that chosen settings follow; empty if it leaves none open."""
    if not open_settings(spec):
        return ""
    # The micro batch follows from whether activations are kept.
    without_effect = Decides.NOT_THE_ADAPTER.settings(spec.training).keys() - {"gradientCheckpointing"}
    training = {name: value for name, value in spec.training.dump().items() if name not in without_effect}
    gpus = (spec.resources.gpu_count, spec.resources.gpu_gib)
    parts = (spec.model.dump(), spec.dataset.dump(), spec.lora.dump(), training, spec.quantization.dump(), gpus)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded_path(path: Path, root: Path) -> str:
    """A path as a PrepareRecord has it: relative to `root` if inside, else absolute."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())


class Comparison(ObservedModel):
    """The adapter's loss on some held-out rows, for a comparison with a merged model."""

    sequences: int = Field(description="Number of held-out sequences, from the first.")
    targets: int = Field(description="Target tokens in them.")
    loss: float = Field(description="Mean loss on these, of the adapter on the 4-bit base.")


class Score(ObservedModel):
    """The number of answers to held-out rows that pass the check of spec.gate.score."""

    settings: str = Field(description="SHA-256 of spec.gate.score, and of the rows' own checks, if they bring any.")
    adapter_sha256: str = Field(description="SHA-256 of the adapter that gave the answers.")
    rows: PositiveInt = Field(description="Rows that were answered.")
    too_long_rows: int | None = Field(None, ge=0, description="Rows that could not be, as their prompt is too long.")
    adapter: Share = Field(description="Share of the adapter's answers that passed.")
    base: Share = Field(description="The same without the adapter.")


class GuardRecord(ObservedModel):
    """What was measured on the rows of a guard of spec.gate."""

    name: str = Field(description="The guard's name.")
    prepared: str = Field(description="Fingerprint of the prepared data, which has these rows.")
    sha256: str = Field(description="SHA-256 of the guard's data.")
    adapter_sha256: str = Field(description="SHA-256 of the adapter that was measured.")
    tokens: int = Field(description="Target tokens that both losses are means of.")
    base_loss: float = Field(description="Loss without the adapter.")
    loss: float = Field(description="Loss of the adapter.")
    score: Score | None = Field(None, description="Not set if the guard asks for none, or before it is measured.")


class BenchmarkRecord(ObservedModel):
    """The scores of a benchmark of spec.gate."""

    task: str = Field(description="Name of the task.")
    metric: str = Field(description="Its metric, as in the spec.")
    limit: PositiveInt = Field(description="Rows that were asked for.")
    tasks_sha256: str = Field(description="SHA-256 of the folder of tasks.")
    adapter_sha256: str = Field(description="SHA-256 of the adapter that was measured.")
    rows: PositiveInt = Field(description="Rows that were answered.")
    adapter: Share = Field(description="Score of the adapter.")
    base: Share = Field(description="The same without the adapter.")

    def is_of(self, spec: BenchmarkSpec) -> bool:
        """Whether it was measured as the spec asks."""
        return (self.task, self.metric, self.limit) == (spec.task, spec.metric, spec.rows)


def score_settings(spec: ScoreSpec, prepared: str = "") -> str:
    """SHA-256 of what decides scores. `prepared`: fingerprint of the rows' checks."""
    settings = spec.dump() | ({"checks": prepared} if spec.of_rows else {})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class QuantizedLayers(ObservedModel):
    """The base's 4-bit layers of one name and shape, such as every block's q_proj."""

    name: str = Field(description="The last part of their module's name.")
    shape: tuple[PositiveInt, ...] = Field(description="Of one layer's weight: outputs and inputs.")
    count: int = Field(description="Number of layers.")
    bytes_each: int = Field(description="Bytes of a layer, constants and tables included.")

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes_each / prod(self.shape)


class AttemptUsage(ObservedModel):
    """The usage of one start of the train step, by the trainer's clock."""

    started_at: Timestamp = Field(description="When its process started.")
    from_step: int = Field(description="Optimizer steps of the checkpoint that it resumed from; 0 without one.")
    seconds: float = Field(description="For how long it ran.")
    startup_seconds: float | None = Field(None, description="Of these, until it trained; not set if it never did.")
    lost_seconds: float = Field(0.0, description="Of these, those whose work no checkpoint holds.")
    ended: Literal["succeeded", "interrupted", "failed"] | None = Field(None, description="Not set if it was killed.")


class RunUsage(ObservedModel):
    """The time of all starts of the train step."""

    gpus: int = Field(description="Processes that trained at the same time, each on a separate GPU.")
    count: int = Field(description="Attempts.")
    seconds: float = Field(description="For how long all attempts ran together.")
    startup_seconds: float = Field(description="Of these, what attempts took until they trained.")
    lost_seconds: float = Field(description="Of these, those whose work no checkpoint holds.")
    attempts: tuple[AttemptUsage, ...] = Field(description="The latest attempts, oldest first.")


class TrainRecord(ObservedModel):
    """The result of train for publish."""

    fingerprint: str = Field(description="SHA-256 of everything that determines the adapter.")
    adapter_path: str = Field(description="Folder of the trained adapter, relative to the workspace.")
    adapter_sha256: str = Field(description="SHA-256 of adapter_model.safetensors in it.")
    training_step: int = Field(description="Optimizer steps done.")
    total_steps: int | None = Field(
        None, description="Optimizer steps planned; more than were done if the run was stopped early."
    )
    adapter_step: int | None = Field(
        None, description="Optimizer steps of the adapter that is kept; all steps of the run if not set."
    )
    loss: float
    initial_eval_loss: float | None = None
    eval_loss: float | None = Field(None, description="Held-out loss of the adapter that is kept.")
    eval_accuracy: Share | None = Field(
        None, description="Its share of the held-out pairs whose chosen answer it prefers; not set without pairs."
    )
    eval_tokens: int | None = Field(None, description="Target tokens of the held-out rows; not set without any.")
    score: Score | None = Field(None, description="Not set if the job asks for none, or before it is measured.")
    guards: tuple[GuardRecord, ...] = Field((), description="Of each guard of spec.gate, once it is measured.")
    benchmarks: tuple[BenchmarkRecord, ...] = Field((), description="Of those of spec.gate that are measured.")
    peak_memory_bytes: int | None = None
    ranks: int = Field(1, description="Processes that trained together.")
    micro_batch_size: int | None = Field(
        None, description="The lower value after the GPU ran out of memory; not set if it never did."
    )
    compute_type: ComputeType = Field("bfloat16", description="The type of matmuls; float32 on a CPU without bfloat16.")
    quantized_parameters: int | None = Field(None, description="Weights of the base that are stored in 4-bit.")
    bits_per_parameter: float | None = Field(None, description="Bits that one of them takes, constants included.")
    quantized_layers: tuple[QuantizedLayers, ...] = Field((), description="The layers that hold them, by kind.")
    base_sha256: str = Field("", description="SHA-256 of the base that it was trained on, as prepare recorded it.")
    compared: Comparison | None = Field(None, description="Loss to compare a merged model with; not set without one.")
    attempts: int = Field(1, description="Number of starts of the step.")
    goodput: Share | None = Field(None, description="Share of the time of all attempts that is in the adapter.")
    usage: RunUsage | None = Field(None, description="Usage of the attempts; not set by an earlier release.")

    def missing_measurement(self, gate: GateSpec | None, prepared: str) -> str:
        """Return the first measurement for the gate that is missing or by other settings, or an empty string.

        `prepared`: fingerprint of the prepared data.
        """
        if gate is None:
            return ""
        guards = {guard.name: guard for guard in self.guards if guard.prepared == prepared}
        scores = {"spec.gate.score": self.score} if gate.score is not None else {}
        for guard in gate.guards or ():
            field = f"spec.gate.guards[{guard.name}]"
            if guard.name not in guards:
                return f"{field}: training has measured no loss on its rows"
            if guard.min_score is not None:
                scores[field] = guards[guard.name].score
        for field, score in scores.items():
            if score is None:
                return f"{field}: training has measured no score"
            if gate.score is not None and score.settings != score_settings(gate.score, prepared):
                return f"{field}: training has measured a score by other settings"
        for benchmark in gate.benchmarks or ():
            if not any(measured.is_of(benchmark) for measured in self.benchmarks):
                return f"spec.gate.benchmarks[{benchmark.task}]: training has measured no score"
        return ""

    @property
    def kept_step(self) -> int:
        """The optimizer step that the adapter is of."""
        return self.training_step if self.adapter_step is None else self.adapter_step

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last planned step."""
        return self.total_steps is not None and self.training_step < self.total_steps


class PublishRecord(ObservedModel):
    """The result of publish."""

    fingerprint: str
    adapter: AdapterStatus
    gate: GateStatus | None = Field(None, description="Result of the gate; not set without spec.gate.")
    merged: MergedStatus | None = None
    base: BaseStatus | None = Field(None, description="The base, if it was published.")
    report_sha256: str | None = Field(None, description="SHA-256 of the published page; not set if there is none.")
    tracking: TrackingStatus | None = Field(None, description="The run on servers of trackers; not set without any.")


_Completion = TypeVar("_Completion", PrepareRecord, TrainRecord, PublishRecord)


def read_completion(path: Path, kind: type[_Completion]) -> _Completion | None:
    """Read the record at `path`, or None without a readable one: the step is redone."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_completion(path: Path, record: PrepareRecord | TrainRecord | PublishRecord) -> None:
    """Write the record durably. If that fails, it is unchanged."""
    write_atomically(path, json.dumps(record.dump(), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n")
