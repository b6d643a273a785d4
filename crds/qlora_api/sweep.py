"""The QLoRASweep resource, version v1alpha1: what a user writes (spec), and the QLoRAJobs that it stands for.

A cell is a QLoRAJob with the spec of the template, in which a few numbers are others. What may differ between cells is
a closed list: nothing that says where data or credentials come from, and nothing that changes which rows are held out
or what the loss on them means, because the cells are compared by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from qlora_api.halving import HalvingSpec
from qlora_api.model_and_output import OutputSpec
from qlora_api.schema import ApiModel, immutable, rule, rules
from qlora_api.training import ModuleName
from qlora_api.v1alpha1 import MAX_NAME_LENGTH, QLoRAJobSpec

SWEEP_KIND = "QLoRASweep"
SWEEP_PLURAL = "qlorasweeps"
MAX_CELLS = 64
MAX_SWEEP_NAME_LENGTH = MAX_NAME_LENGTH - len("-00")

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


class Overrides(ApiModel):
    """What one cell changes in the template. Empty: the template as it is."""

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

    @model_validator(mode="after")
    def _only_one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(_ONE_LENGTH)
        return self

    def text(self) -> str:
        """For people: `rank=16 learningRate=0.0002`; `template` for a cell that changes nothing."""

        def written(value: Any) -> str:
            return ",".join(value) if isinstance(value, list) else str(value)

        return " ".join(f"{name}={written(value)}" for name, value in self.dump().items()) or "template"


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
    """Values of fields: each combination of them is a cell. The values of the last field in this list change first."""

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
        if sum(1 for _ in product(*lists.values())) > MAX_CELLS:
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


_NO_EVALUATION = "a sweep chooses by the loss on held-out rows: set spec.template.spec.dataset.eval"
_SUSPENDED = "suspend the sweep (spec.suspend) and not its template"
_ONE_ADAPTER = (
    "each cell publishes to a folder of its own below output.destination, which must be pvc:// or s3:// for that: "
    "remove an hf:// or oci:// destination, and upload the adapter of status.best yourself"
)
_MERGED = "output.merged would merge the adapter of every cell: remove it, and merge that of status.best"
_CONTINUED = "continues takes up one run with the same settings, which cells change: remove it, or set lora.from"
_GROUPED = "group is for jobs that are created one by one: remove it, and set parallelism"
_ONE_SOURCE = "set exactly one of grid and cells"
_OTHER_ROWS = (
    "training.seed chooses the rows of dataset.eval.fraction, so that cells with different seeds could not be "
    "compared: set dataset.eval.source, or leave seed out"
)
_OTHER_ADAPTER = (
    "lora.from begins each cell with an adapter whose rank, alpha and targetModules it must have: remove these from "
    "grid and cells, or remove lora.from"
)
_OF_THE_ADAPTER = ("rank", "alpha", "targetModules")
_REMEDY = "delete the QLoRASweep and create it again, or create one with another name"


class SweepTemplate(ApiModel):
    """What all cells have in common."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.spec.dataset.eval)", _NO_EVALUATION),
            rule("!self.spec.suspend", _SUSPENDED),
            rule(
                "!has(self.spec.output.destination) || self.spec.output.destination.matches('^(pvc|s3)://')",
                _ONE_ADAPTER,
            ),
            rule("!has(self.spec.output.merged)", _MERGED),
            rule("!has(self.spec.continues)", _CONTINUED),
            rule("!has(self.spec.group)", _GROUPED),
        )
    )

    spec: QLoRAJobSpec = Field(
        description="The spec of a QLoRAJob. workspace is the one claim that all cells use; a cell publishes to the "
        "folder of its name below output.destination."
    )

    @model_validator(mode="after")
    def _of_a_cell(self) -> Self:
        output: OutputSpec = self.spec.output
        if self.spec.dataset.eval is None:
            raise ValueError(_NO_EVALUATION)
        if self.spec.suspend:
            raise ValueError(_SUSPENDED)
        if output.destination is not None and not output.destination.startswith(("pvc://", "s3://")):
            raise ValueError(_ONE_ADAPTER)
        if output.merged is not None:
            raise ValueError(_MERGED)
        if self.spec.continues is not None:
            raise ValueError(_CONTINUED)
        if self.spec.group is not None:
            raise ValueError(_GROUPED)
        return self


_NO_RUNG = (
    "halving compares cells at the evaluations after minSteps, minSteps · factor and so on: set "
    "spec.template.spec.training.evalEverySteps to minSteps, or to a number of which that is a multiple"
)
_RUNG_AFTER_THE_END = (
    "halving.minSteps is not below spec.template.spec.training.maxSteps, so that no cell would be stopped: set a lower "
    "minSteps, or remove halving"
)
_NO_SCORE = "best: score compares the scores of spec.template.spec.gate.score: set that, or leave best out"
MUTABLE_SWEEP_FIELDS = frozenset({"parallelism", "suspend"})


def _sweep_rules(schema: dict[str, Any]) -> None:
    in_grid = " || ".join(f"has(self.grid.{field})" for field in _OF_THE_ADAPTER)
    in_a_cell = " || ".join(f"has(c.{field})" for field in _OF_THE_ADAPTER)
    schema.update(
        rules(
            rule(
                "!has(self.template.spec.lora.from) || !((has(self.grid) && "
                f"({in_grid})) || (has(self.cells) && self.cells.exists(c, {in_a_cell})))",
                _OTHER_ADAPTER,
            ),
            rule("has(self.grid) != has(self.cells)", _ONE_SOURCE),
            rule(
                "self.best != 'score' || (has(self.template.spec.gate) && has(self.template.spec.gate.score))",
                _NO_SCORE,
            ),
            rule(
                "!((has(self.grid) && has(self.grid.seed)) || (has(self.cells) && self.cells.exists(c, has(c.seed)))) "
                "|| !has(self.template.spec.dataset.eval) || has(self.template.spec.dataset.eval.source)",
                _OTHER_ROWS,
            ),
            rule(
                "!has(self.halving) || (has(self.template.spec.training.evalEverySteps) && "
                "self.halving.minSteps % self.template.spec.training.evalEverySteps == 0)",
                _NO_RUNG,
            ),
            rule(
                "!has(self.halving) || !has(self.template.spec.training.maxSteps) || "
                "self.halving.minSteps < self.template.spec.training.maxSteps",
                _RUNG_AFTER_THE_END,
            ),
            *immutable(QLoRASweepSpec, except_for=MUTABLE_SWEEP_FIELDS, remedy=_REMEDY, of="the sweep"),
        )
    )


class QLoRASweepSpec(ApiModel):
    """Several fine-tuning runs that differ in a few numbers, and the choice of the best. Each is a QLoRAJob, a cell."""

    model_config = ConfigDict(json_schema_extra=_sweep_rules)

    template: SweepTemplate = Field(description="What all cells have in common.")
    grid: Grid | None = Field(None, description="Values of fields, of which each combination is a cell; or set cells.")
    cells: Annotated[tuple[Overrides, ...], Field(min_length=1, max_length=MAX_CELLS)] | None = Field(
        None, description="The cells one by one, each by what it changes in the template; or set grid."
    )
    best: Literal["evalLoss", "score"] = Field(
        "evalLoss",
        description="What the best cell has: the lowest loss on the held-out rows (evalLoss), or the highest score of "
        "the template's gate, and the lower loss of two with the same score.",
    )
    halving: HalvingSpec | None = Field(
        None,
        description="Stop cells early whose loss on the held-out rows is not among the best at a rung; not set: each "
        "cell runs to its end. Needs training.evalEverySteps in the template.",
    )
    parallelism: int = Field(
        1,
        ge=1,
        le=MAX_CELLS,
        description="Cells that run at the same time. More than 1 needs a workspace that several nodes can mount.",
    )
    suspend: bool = Field(False, description="true suspends the cells that run and starts no other; false goes on.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.grid is None) == (self.cells is None):
            raise ValueError(_ONE_SOURCE)
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        held_out = self.template.spec.dataset.eval
        seeded = any(overrides.seed is not None for overrides in self.overrides())
        if seeded and held_out is not None and held_out.source is None:
            raise ValueError(_OTHER_ROWS)
        return self

    @model_validator(mode="after")
    def _of_the_earlier_adapter(self) -> Self:
        if self.template.spec.lora.initial_adapter is None:
            return self
        changed = {name for overrides in self.overrides() for name in overrides.dump()}
        if changed & set(_OF_THE_ADAPTER):
            raise ValueError(_OTHER_ADAPTER)
        return self

    @model_validator(mode="after")
    def _scored(self) -> Self:
        gate = self.template.spec.gate
        if self.best == "score" and (gate is None or gate.score is None):
            raise ValueError(_NO_SCORE)
        return self

    @model_validator(mode="after")
    def _evaluated_at_rungs(self) -> Self:
        training = self.template.spec.training
        if self.halving is None:
            return self
        if training.eval_every_steps is None or self.halving.min_steps % training.eval_every_steps:
            raise ValueError(_NO_RUNG)
        if training.max_steps is not None and self.halving.min_steps >= training.max_steps:
            raise ValueError(_RUNG_AFTER_THE_END)
        return self

    def overrides(self) -> tuple[Overrides, ...]:
        """What each cell changes, in their order."""
        return self.grid.cells() if self.grid is not None else self.cells or ()


@dataclass(frozen=True)
class Cell:
    """One QLoRAJob of a sweep, as it is to be created."""

    name: str
    overrides: Overrides
    spec: QLoRAJobSpec


def cells(name: str, spec: QLoRASweepSpec, claim: str) -> tuple[Cell, ...]:
    """The cells of the sweep `name`, in their order; all use the workspace `claim`.

    It depends on nothing else, so that a cell has the same name and spec each time. Raises ValueError if the changes of
    a cell do not fit the template, or are those of another cell of the grid: it names the cell.
    """
    return tuple(_cells(name, spec, claim))


def _cells(name: str, spec: QLoRASweepSpec, claim: str) -> Iterator[Cell]:
    known: set[Overrides] = set()
    for number, overrides in enumerate(spec.overrides()):
        cell = f"{name}-{number:02}"
        # The schema compares no lists, and takes 0 and 0.0 for two values.
        if spec.grid is not None and overrides in known:
            raise ValueError(f"cell {cell} ({overrides.text()}) is there twice: a list of the grid repeats a value")
        known.add(overrides)
        try:
            yield Cell(cell, overrides, _cell_spec(cell, spec.template.spec, overrides, claim))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"cell {cell} ({overrides.text()}): {field}: {first['msg']}") from error


def _cell_spec(cell: str, template: QLoRAJobSpec, overrides: Overrides, claim: str) -> QLoRAJobSpec:
    content = template.dump()
    changes = overrides.dump()
    if "epochs" in changes or "maxSteps" in changes:
        content["training"] = {
            key: value for key, value in content["training"].items() if key not in ("epochs", "maxSteps")
        }
    for key, value in changes.items():
        content["lora" if key in content["lora"] else "training"][key] = value
    content["workspace"] = {"claimName": claim}
    destination = template.output.destination
    if destination is not None:
        content["output"]["destination"] = f"{destination.rstrip('/')}/{cell}"
    return QLoRAJobSpec.model_validate(content)
