"""The fields that may differ between a sweep's cells, one by one or as a grid."""

import math
from itertools import product
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, model_validator

from qlora_api.schema import ApiModel, rule, rules
from qlora_api.spec.dataset import DatasetSpec, MixSource
from qlora_api.spec.output import OutputSpec
from qlora_api.spec.training import ModuleName

MAX_CELLS = 64

T = TypeVar("T")
Values = Annotated[
    tuple[T, ...], Field(min_length=1, max_length=MAX_CELLS, json_schema_extra={"x-kubernetes-list-type": "set"})
]
TargetModules = Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=32)]
TargetModulesList = Annotated[tuple[TargetModules, ...], Field(min_length=1, max_length=MAX_CELLS)]
# The bounds of the fields of a QLoRAJob that they stand for.
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[int, Field(ge=1, le=8192)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
MaxSteps = Annotated[int, Field(ge=1, le=10_000_000)]
MicroBatchSize = Annotated[int, Field(ge=1, le=1024)]
Accumulation = Annotated[int, Field(ge=1, le=4096)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Scheduler = Literal["constant", "linear", "cosine"]
WarmupSteps = Annotated[int, Field(ge=0, le=1_000_000)]
WeightDecay = Annotated[float, Field(ge=0, le=1)]
MaxGradNorm = Annotated[float, Field(gt=0, le=1000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

_ONE_LENGTH = "epochs and maxSteps both set the length of a run: name one of them"


class CellDataset(DatasetSpec):
    """The training data of one cell."""

    # With 16 sources for each of 64 cells, the rules would exceed the API server's limit on their cost.
    mix: tuple[MixSource, ...] | None = Field(
        None, min_length=1, max_length=6, description="Several sources instead of one, as in a QLoRAJob; at most six."
    )


class Overrides(ApiModel):
    """The changes of one cell to the template. Empty: the template as it is."""

    model_config = ConfigDict(json_schema_extra=rules(rule("!has(self.epochs) || !has(self.maxSteps)", _ONE_LENGTH)))

    rank: Rank | None = Field(None, description="lora.rank of the cell; the template's if not set.")
    alpha: Alpha | None = Field(None, description="lora.alpha of the cell; the template's if not set.")
    dropout: Dropout | None = Field(None, description="lora.dropout of the cell; the template's if not set.")
    target_modules: TargetModules | None = Field(
        None, description="lora.targetModules of the cell; the template's if not set."
    )
    learning_rate: LearningRate | None = Field(
        None, description="training.learningRate of the cell; the template's if not set."
    )
    scheduler: Scheduler | None = Field(None, description="training.scheduler of the cell; the template's if not set.")
    warmup_steps: WarmupSteps | None = Field(
        None, description="training.warmupSteps of the cell; the template's if not set."
    )
    weight_decay: WeightDecay | None = Field(
        None, description="training.weightDecay of the cell; the template's if not set."
    )
    max_grad_norm: MaxGradNorm | None = Field(
        None, description="training.maxGradNorm of the cell; the template's if not set."
    )
    micro_batch_size: MicroBatchSize | None = Field(
        None, description="training.microBatchSize of the cell; the template's if not set."
    )
    gradient_accumulation_steps: Accumulation | None = Field(
        None, description="training.gradientAccumulationSteps of the cell; the template's if not set."
    )
    epochs: Epochs | None = Field(
        None, description="training.epochs of the cell, also if the template sets maxSteps; its length if not set."
    )
    max_steps: MaxSteps | None = Field(
        None, description="training.maxSteps of the cell, also if the template sets epochs; its length if not set."
    )
    seed: Seed | None = Field(None, description="training.seed of the cell; the template's if not set.")
    dataset: CellDataset | None = Field(
        None,
        description="With select: all, the whole data set of the cell; the template's if not set. A mix has at most "
        "six sources.",
    )
    output: OutputSpec | None = Field(
        None,
        description="With select: all, the whole output of the cell, whose adapter is published to the destination "
        "itself; if not set, the template's, with a folder of the cell's name.",
    )

    @model_validator(mode="after")
    def _only_one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(_ONE_LENGTH)
        return self

    def text(self) -> str:
        """Format for users: `rank=16 learningRate=0.0002`, or `template` without a change."""
        values = self.dump()
        if self.dataset is not None:
            values["dataset"] = list(self.dataset.addresses.values())
        if self.output is not None:
            values["output"] = list(self.output.destinations.values()) or "workspace"
        written = (f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in values.items())
        return " ".join(written) or "template"


_TOO_MANY = f"the grid has more than {MAX_CELLS} cells, which is the product of the lengths of its lists"
_EMPTY = "name at least one field with its values"


def _grid_rules(schema: dict[str, Any]) -> None:
    sizes = (f"(has(self.{field.alias}) ? self.{field.alias}.size() : 1)" for field in Grid.model_fields.values())
    some = " || ".join(f"has(self.{field.alias})" for field in Grid.model_fields.values())
    schema.update(
        rules(
            rule(some, _EMPTY),
            rule(f"{' * '.join(sizes)} <= {MAX_CELLS}", _TOO_MANY),
            rule("!has(self.epochs) || !has(self.maxSteps)", _ONE_LENGTH),
        )
    )


class Grid(ApiModel):
    """Values of fields: each combination is a cell. The last field changes first."""

    model_config = ConfigDict(json_schema_extra=_grid_rules)

    rank: Values[Rank] | None = Field(None, description="Values of lora.rank.")
    alpha: Values[Alpha] | None = Field(None, description="Values of lora.alpha.")
    dropout: Values[Dropout] | None = Field(None, description="Values of lora.dropout.")
    target_modules: TargetModulesList | None = Field(None, description="Values of lora.targetModules, each a list.")
    learning_rate: Values[LearningRate] | None = Field(None, description="Values of training.learningRate.")
    scheduler: Values[Scheduler] | None = Field(None, description="Values of training.scheduler.")
    warmup_steps: Values[WarmupSteps] | None = Field(None, description="Values of training.warmupSteps.")
    weight_decay: Values[WeightDecay] | None = Field(None, description="Values of training.weightDecay.")
    max_grad_norm: Values[MaxGradNorm] | None = Field(None, description="Values of training.maxGradNorm.")
    micro_batch_size: Values[MicroBatchSize] | None = Field(None, description="Values of training.microBatchSize.")
    gradient_accumulation_steps: Values[Accumulation] | None = Field(
        None, description="Values of training.gradientAccumulationSteps."
    )
    epochs: Values[Epochs] | None = Field(None, description="Values of training.epochs.")
    max_steps: Values[MaxSteps] | None = Field(None, description="Values of training.maxSteps.")
    seed: Values[Seed] | None = Field(None, description="Values of training.seed.")

    @model_validator(mode="after")
    def _within_limits(self) -> Self:
        lists = self._lists()
        if not lists:
            raise ValueError(_EMPTY)
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(_ONE_LENGTH)
        if math.prod(map(len, lists.values())) > MAX_CELLS:
            raise ValueError(_TOO_MANY)
        return self

    def cells(self) -> tuple[Overrides, ...]:
        """Each combination, in an order that depends on the grid only."""
        lists = self._lists()
        return tuple(
            Overrides.model_validate(dict(zip(lists, values, strict=True))) for values in product(*lists.values())
        )

    def _lists(self) -> dict[str, tuple[Any, ...]]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: values for name, values in found.items() if values is not None}
