"""The part of a QLoRAJob's spec about the adapter, its training, and the hardware."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import GpuMemory, Quantity, gibibytes
from qlora_api.schema import ApiModel, Decides, rule, rules
from qlora_api.spec.model import InitialAdapterSpec

MAX_RANK, MAX_ALPHA = 1024, 8192
BlockNumber = Annotated[int, Field(ge=0, le=1023)]
TrainOn = Literal["completion", "last", "weighted", "marked", "all"]
ModuleName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]


class QuantizationSpec(ApiModel):
    """How the base model is quantized: 4 bits per weight (arXiv 2305.14314).

    Computation is in bfloat16, on a CPU without it in float32.
    """

    type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit data type: NormalFloat (nf4) or float (fp4).")
    double_quant: bool = Field(
        default=True, description="Quantize the quantization constants too: 4.127 instead of 4.5 bits per weight."
    )


class LoraSpec(ApiModel):
    """The low-rank adapter that is trained."""

    rank: int | None = Field(
        default=None,
        ge=1,
        le=MAX_RANK,
        description="Rank r of the adapter. A server must allow it (vLLM: --max-lora-rank). Automatic: 16, doubled up "
        "to 256 while the adapter has fewer weights than an epoch has tokens that are trained on.",
    )
    alpha: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ALPHA,
        description="Scaling numerator: the adapter's output is multiplied by alpha / rank. Automatic: 32; with "
        "useRslora 8.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    target_modules: tuple[ModuleName, ...] = Field(
        default=("all-linear",),
        min_length=1,
        max_length=32,
        description="Layers that get an adapter: all-linear (every linear layer of the decoder blocks, of a mixture of "
        "experts those that all tokens use), or names such as q_proj.",
    )
    use_rslora: bool = Field(
        default=False, description="rsLoRA: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: train magnitude and direction separately (arXiv 2402.09353). Slower; not served by vLLM.",
    )
    layers_to_transform: Annotated[tuple[BlockNumber, ...], Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Indices of the decoder blocks that get an adapter, from 0; all if not set."
    )
    modules_to_save: (
        Annotated[tuple[Literal["embed_tokens", "lm_head"], ...], Field(min_length=1, max_length=2)] | None
    ) = Field(
        default=None,
        description="Modules that are trained in full, in 16-bit, and saved with the adapter: the token embeddings "
        "(embed_tokens), the output layer (lm_head). Costs memory; few servers load such an adapter.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the stored adapter weights. bfloat16 saves memory but loses small updates.",
    )
    initial_adapter: InitialAdapterSpec | None = Field(
        default=None,
        alias="from",
        description="An earlier adapter to train further, instead of a new one. The base, rank, alpha, useRslora, "
        "useDora, modulesToSave and the adapted layers must be those of that adapter.",
    )


class PreferenceSpec(ApiModel):
    """How strongly an objective that compares two answers moves the model."""

    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="dpo: strength of the constraint to the base; a small value lets the adapter go further. orpo: "
        "weight of the odds ratio relative to the cross-entropy of the chosen answer (lambda of arXiv 2403.07691).",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        # Not below 0.5: the API server takes a whole number for too large then, 0 included.
        le=0.5,
        description="dpo: probability that the two answers of a pair were swapped by mistake (conservative DPO).",
    )


_PREFERENCE_UNUSED = (
    "training.preference is for an objective that compares two answers: set training.objective to dpo or orpo, or "
    "remove preference"
)
_SMOOTHING_IS_DPO = "training.preference.labelSmoothing is for objective dpo: remove it"
_PAIRS_TRAIN_ON_ANSWERS = (
    "training.objective dpo and orpo compare answers, whose prompt is the same: set training.trainOn to completion, or "
    "remove it"
)


_ONE_LENGTH = "set only one of epochs and maxSteps"
_ONE_BATCH = "set only one of batchSize and gradientAccumulationSteps"
_ONE_RATE = "set only one of learningRate and learningRateMultiplier"
_BATCH_OF_ROWS = (
    "training.batchSize counts rows, and packing puts several rows into one sequence: remove packing, or set "
    "gradientAccumulationSteps instead of batchSize"
)


class EarlyStoppingSpec(ApiModel):
    """Ends training early, once the loss on the held-out rows no longer falls."""

    patience: int = Field(
        ge=1,
        le=10_000,
        description="Consecutive evaluations without an improvement until training ends, as a success.",
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="By how much (nats per target token, or per pair if the objective compares answers) an evaluation "
        "must be more than below the lowest loss so far, that before training included, to count as an improvement.",
    )


class TrainingSpec(ApiModel):
    """Settings of training. prepare chooses those that are automatic, by the rows and the model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!(has(self.epochs) && has(self.maxSteps))", _ONE_LENGTH),
            rule("!(has(self.batchSize) && has(self.gradientAccumulationSteps))", _ONE_BATCH),
            rule("!(has(self.learningRate) && has(self.learningRateMultiplier))", _ONE_RATE),
            rule("!has(self.batchSize) || !has(self.packing) || !self.packing", _BATCH_OF_ROWS),
            rule(
                "!has(self.preference) || (has(self.objective) && self.objective != 'supervised')", _PREFERENCE_UNUSED
            ),
            rule(
                "!has(self.preference) || self.preference.labelSmoothing == 0.0 || "
                "(has(self.objective) && self.objective == 'dpo')",
                _SMOOTHING_IS_DPO,
            ),
            rule(
                "!has(self.objective) || self.objective == 'supervised' || self.trainOn == 'completion'",
                _PAIRS_TRAIN_ON_ANSWERS,
            ),
        )
    )

    objective: Literal["supervised", "dpo", "orpo"] | None = Field(
        default=None,
        description="The minimized loss: the cross-entropy of the targets (supervised, also if not set); or, for data "
        "of format preference, the loss of direct preference optimization (dpo, arXiv 2305.18290), whose reference is "
        "the base without the adapter, or of odds ratio preference optimization (orpo, arXiv 2403.07691).",
    )
    preference: PreferenceSpec | None = Field(
        default=None, description="Settings of the objectives dpo and orpo; their defaults if not set."
    )

    epochs: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Passes over the data, unless maxSteps is set. Automatic: 3 up to 8,333 rows, 2 up to 12,500, else "
        "1; of few rows up to 10, until the run can make 100 optimizer steps.",
    )
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Sequences in one forward pass. Costs GPU memory. Automatic: as many as have 4,096 tokens, fewer "
        "where the GPU or the step has no room for them; 1 for a model that cannot keep rows apart.",
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Micro batches in one optimizer step. Costs no memory. Automatic: those of batchSize; without it "
        "for 150 optimizer steps or more, with 1 to 16 sequences in each, and a multiple of the GPUs.",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rows in one optimizer step, of all GPUs together, instead of gradientAccumulationSteps. It must "
        "be a multiple of a microBatchSize that is set times the GPUs, and an automatic one divides it. Rows are not "
        "packed then. Not set: a step has microBatchSize × gradientAccumulationSteps sequences.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate. Automatic: 3e-4 × (4096 / width)^1.1, where width is that of the model's "
        "hidden states; a tenth of it if the objective compares answers.",
    )
    learning_rate_multiplier: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Factor of the automatic learning rate, instead of learningRate. The product must not exceed 1. "
        "Not set: 1.",
    )
    scheduler: Literal["constant", "linear", "cosine"] | None = Field(
        default=None, description="Learning rate after the warm-up. Automatic: linear, to 0 at the end."
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Optimizer steps of the linear rise of the rate from 0. Automatic: 5 percent of the steps, 1 to "
        "100.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(default=0.3, gt=0, le=1000, description="Gradients are scaled down to this norm.")
    auto_micro_batch: Annotated[bool | None, Decides.NOT_THE_ADAPTER] = Field(
        default=None,
        description="When the GPU runs out of memory, repeat the step with half the microBatchSize and twice the "
        "gradientAccumulationSteps, keep these for the rest of the run, and report the change. Automatic: true where "
        "microBatchSize is automatic too and above 1, unless jobs are trained together.",
    )
    divergence_patience: Annotated[int, Decides.NOT_THE_ADAPTER] = Field(
        default=20,
        ge=0,
        le=10_000,
        description="Consecutive optimizer steps with a loss or gradient norm far above that of the steps before; then "
        "training fails if the loss is more than 1 nat above the loss before the first step (the base, or the "
        "adapter of lora.from) on the same rows; at the run's last step one is enough, or a rise of the loss. 0 never "
        "fails for this. NaN and infinity fail immediately.",
    )
    sharding: Literal["none", "full"] = Field(
        default="none",
        description="With several GPUs: each holds the whole base (none), or a part of it (full, FSDP2), which is "
        "slower and needs less memory. full does not support merged output, samples or autoMicroBatch.",
    )
    report_to: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Field(max_length=3), Decides.NOT_THE_ADAPTER
    ] = Field(
        default=(),
        description="Trackers of the run. tensorboard: train writes its files to report/tensorboard of the workspace. "
        "mlflow, wandb: publish uploads the run to the server that the profile names, if any (output.tracking).",
    )
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"] = Field(
        default="paged_adamw_32bit", description="AdamW with paged state in 32-bit or 8-bit, or PyTorch's AdamW."
    )
    max_sequence_length: Annotated[int | None, Decides.PREPARED_DATA] = Field(
        default=None,
        ge=16,
        le=131_072,
        description="Tokens per sequence. Longer rows are left out and reported in status.dataset. A row of format "
        "preference has the tokens of both answers, each with the prompt. Automatic: the next power of two that holds "
        "the longest row, 128 or more; above 2,048 it may leave out 0.5 percent of the rows.",
    )
    packing: Annotated[bool | None, Decides.PREPARED_DATA] = Field(
        default=None,
        description="Pack several rows into each sequence. Attention does not cross rows. Without effect on a model "
        "that cannot keep rows apart. Automatic: true, unless batchSize is set or the run would then make fewer than "
        "100 optimizer steps.",
    )
    train_on: Annotated[TrainOn, Decides.PREPARED_DATA] = Field(
        default="completion",
        description="Tokens that are trained on: those of every answer (completion), of the last answer of each row "
        "(last), of the assistant messages without weight: 0 (weighted), of those with train: true or weight: 1 "
        "(marked), or all.",
    )
    gradient_checkpointing: Annotated[bool | None, Decides.NOT_THE_ADAPTER] = Field(
        default=None,
        description="Recompute activations in the backward pass: saves much memory, takes a third more time. "
        "Automatic: where the GPU's memory is known, only blocks whose activations it has no room for. If that has no "
        "room for the inputs of recomputed blocks, these are held in host memory, in up to half of resources.memory. "
        "On a CPU: all blocks, unless resources.memory has room for their activations.",
    )
    eval_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Optimizer steps between evaluations. Automatic: one evaluation an epoch, three or more in all; "
        "without held-out rows none.",
    )
    keep: Literal["last", "best"] | None = Field(
        default=None,
        description="The adapter that is published: that of the last optimizer step, or of the evaluation with the "
        "lowest loss on the held-out rows (the first of equal ones; never the untrained one). best needs held-out "
        "rows, and disk for up to three more adapters. Automatic: best where rows are held out, else last.",
    )
    early_stopping: EarlyStoppingSpec | None = Field(
        default=None,
        description="End training once the loss on the held-out rows no longer falls. keep selects the published "
        "adapter. Not set: train to the last step.",
    )
    save_every_steps: Annotated[int, Decides.NOT_THE_ADAPTER] = Field(
        default=50, ge=1, le=10_000_000, description="Optimizer steps between checkpoints."
    )
    samples: Annotated[int, Decides.NOT_THE_ADAPTER] = Field(
        default=3,
        ge=0,
        le=20,
        description="Number of prompts whose answers, without and with the adapter, are shown in the report.",
    )
    seed: Annotated[int, Decides.PREPARED_DATA] = Field(
        default=0, ge=0, le=2**31 - 1, description="Seed of initialization, data order and dropout."
    )

    @model_validator(mode="after")
    def _only_one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(_ONE_LENGTH)
        return self

    @model_validator(mode="after")
    def _only_one_of_each(self) -> Self:
        if self.batch_size is not None and self.gradient_accumulation_steps is not None:
            raise ValueError(_ONE_BATCH)
        if self.learning_rate is not None and self.learning_rate_multiplier is not None:
            raise ValueError(_ONE_RATE)
        return self

    @model_validator(mode="after")
    def _batch_of_rows(self) -> Self:
        if self.batch_size is not None and self.packing:
            raise ValueError(_BATCH_OF_ROWS)
        return self

    @property
    def may_pack(self) -> bool:
        """Whether the job packs rows or leaves it open."""
        return self.packing is not False and self.batch_size is None

    @property
    def compares_answers(self) -> bool:
        """Whether the objective is one for pairs of a chosen and a rejected answer."""
        return self.objective is not None and self.objective != "supervised"

    @model_validator(mode="after")
    def _settings_of_the_objective(self) -> Self:
        if self.preference is not None and not self.compares_answers:
            raise ValueError(_PREFERENCE_UNUSED)
        if self.preference is not None and self.preference.label_smoothing and self.objective != "dpo":
            raise ValueError(_SMOOTHING_IS_DPO)
        if self.compares_answers and self.train_on != "completion":
            raise ValueError(_PAIRS_TRAIN_ON_ANSWERS)
        return self


MAX_GPUS, MAX_NODES = 16, 64


class ResourcesSpec(ApiModel):
    """GPUs, CPU and memory of each train pod, and the number of these pods."""

    gpus: int = Field(
        default=1,
        ge=1,
        le=MAX_GPUS,
        description="GPUs of each train pod. With several, each trains on its share of every step's micro batches; the "
        "result is that of one GPU, up to rounding. A gradientAccumulationSteps that is set should be a multiple of "
        "gpus × nodes.",
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        le=MAX_NODES,
        description="Train pods, each with these gpus, cpu and memory, that train one adapter together; 1 if not "
        "set. Several need a workspace that is ReadWriteMany, and a profile whose workspace.topology is shared.",
    )
    gpu_memory: GpuMemory | None = Field(
        default=None,
        description="Memory of each GPU, for example 24Gi; the profile's, or that of its nodes, if not set. With any, "
        "prepare, which has no GPU, rejects a job that cannot fit, and keeps as many activations as do.",
    )
    cpu: Quantity | None = Field(default=None, description="CPU cores of each train pod; the profile's if not set.")
    memory: Quantity | None = Field(
        default=None, description="Host memory of each train pod; the profile's if not set."
    )

    @property
    def gpu_gib(self) -> int | None:
        """Memory of each GPU in GiB, if it is set."""
        return None if self.gpu_memory is None else gibibytes(self.gpu_memory)

    @property
    def node_count(self) -> int:
        """Number of train pods."""
        return self.nodes or 1

    @property
    def gpu_count(self) -> int:
        """GPUs of all train pods."""
        return self.gpus * self.node_count
