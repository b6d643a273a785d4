"""The QLoRASweep resource, version v1beta1: the user's spec, and its QLoRAJobs.

A cell is a QLoRAJob with the spec of the template and other values of a closed list of fields. With `select: best` no
cell may change the held-out rows, whose loss compares them; with `select: all` cells may differ in data and output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from qlora_api.joinable import MAX_TOGETHER, not_together, rules_of_template
from qlora_api.kubernetes_values import DNS_LABEL, ManagedBy
from qlora_api.problems import explain_first
from qlora_api.retention import TtlSeconds
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import OBJECT_STORES, prefixes, scheme_of
from qlora_api.spec.job import KEEPS_CLAIM, MAX_NAME_LENGTH, ObjectMeta, QLoRAJobSpec
from qlora_api.spec.output import OutputSpec
from qlora_api.spec.training import LoraSpec
from qlora_api.sweep.grid import MAX_CELLS, Grid, Overrides
from qlora_api.sweep.halving import HalvingSpec
from qlora_api.sweep.template import SweepTemplate

T = TypeVar("T")
SWEEP_KIND = "QLoRASweep"
SWEEP_PLURAL = "qlorasweeps"
MAX_SWEEP_NAME_LENGTH = MAX_NAME_LENGTH - len("-00")
BEST_SUFFIX = "-best"
_MAX_NAME_WITH_BEST = MAX_NAME_LENGTH - len(BEST_SUFFIX)

_NO_EVALUATION = "select: best compares the losses on held-out rows: set spec.template.spec.dataset.eval to some"
_DIFFERENT_DATA = (
    "select: best compares cells by the loss on the same rows, and publishes to the template's output: set select: "
    "all, or remove dataset and output from cells"
)
_NOTHING_COMPARED = "select: all compares no cells: remove halving, best: score and publish: best, or set select: best"
_ONE_PLACE = "two cells have the same output.destination: give each cell another"
_WITH_FOLDERS = ("pvc", *OBJECT_STORES)
_ONE_ADAPTER = (
    "each cell publishes to a folder of its own below output.destination, which must be on a volume or in a bucket "
    f"for that ({prefixes(_WITH_FOLDERS)}): set publish: best to publish only the best adapter, to any destination, or "
    "select: all with an output in each cell, and remove the template's"
)
_MERGED = (
    "output.merged would merge the adapter of every cell: set publish: best to merge only the best, or remove merged"
)
_NOTHING_TO_PUBLISH = (
    "publish: best publishes to the template's output, which names no place: set output.destination, output.merged or "
    "output.base, or remove publish"
)
_TOGETHER = "cellsPerPod"
_DROPOUT = (
    "lora.dropout is not supported with cellsPerPod, which trains several jobs in one process: remove dropout above 0 "
    "from grid and cells, or remove cellsPerPod"
)
_STOPPED_TOGETHER = (
    "halving stops single cells, and with cellsPerPod a pod trains several to their ends: remove one of them"
)
_ONE_SOURCE = "set exactly one of grid and cells"
_OTHER_ROWS = (
    "training.seed chooses the rows of dataset.eval.fraction, so that cells with different seeds could not be "
    "compared: set dataset.eval.source, or leave seed out"
)
_OTHER_ADAPTER = (
    "lora.from begins each cell with an adapter whose rank, alpha and targetModules it must have: remove these from "
    "grid and cells, or remove lora.from"
)
_OF_LORA = frozenset(field.alias for field in LoraSpec.model_fields.values())
_ALTERNATIVES = (
    frozenset({"epochs", "maxSteps"}),
    frozenset({"gradientAccumulationSteps", "batchSize"}),
    frozenset({"learningRate", "learningRateMultiplier"}),
)
"""Settings of which a job has one at most: that of the cell, if it has one."""
_OF_THE_ADAPTER = ("rank", "alpha", "targetModules")
REMEDY = "delete the QLoRASweep and create it again, or create one with another name"
_NO_RUNG = (
    "halving compares cells at the evaluations after minSteps, minSteps · factor and so on: set "
    "spec.template.spec.training.evalEverySteps to minSteps, or to a divisor of it"
)
_RUNG_AFTER_THE_END = (
    "halving.minSteps is not below spec.template.spec.training.maxSteps, so that no cell would be stopped: set a lower "
    "minSteps, or remove halving"
)
_NO_SCORE = "best: score compares the scores of spec.template.spec.gate.score: set that, or leave best out"
MUTABLE_SWEEP_FIELDS = frozenset({"parallelism", "suspend", "ttl_seconds_after_finished"})
_OUTPUT = "self.template.spec.output"
_KEEPS_CLAIM = KEEPS_CLAIM.replace("self.", "self.template.spec.")
_OUTSIDE = (
    "!has(c.output) || (has(c.output.destination) && (!has(c.output.merged) || has(c.output.merged.destination)))"
)
_ON_THE_CLAIM = (
    "persistentVolumeClaimRetentionPolicy: Delete would delete adapters: set a destination in each output of cells"
)
_SOMETHING_TO_PUBLISH = " || ".join(f"has({_OUTPUT}.{field})" for field in ("destination", "merged", "base"))
_NAME_WITH_BEST = (
    f"metadata.name must have at most {_MAX_NAME_WITH_BEST} characters with publish: best: the QLoRAJob that publishes "
    f"the best adapter has the sweep's name and {BEST_SUFFIX}"
)
NAME_WITH_BEST_RULE = rule(
    f"self.spec.publish != 'best' || self.metadata.name.size() <= {_MAX_NAME_WITH_BEST}", _NAME_WITH_BEST
)
"""For the whole object: the spec does not know the sweep's name."""


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
                "self.select == 'all' || (has(self.template.spec.dataset.eval) && "
                "(!has(self.template.spec.dataset.eval.fraction) || self.template.spec.dataset.eval.fraction > 0.0))",
                _NO_EVALUATION,
            ),
            rule(
                "self.select == 'all' || !has(self.cells) || !self.cells.exists(c, has(c.dataset) || has(c.output))",
                _DIFFERENT_DATA,
            ),
            rule(
                "self.select == 'best' || (!has(self.halving) && self.best != 'score' && self.publish != 'best')",
                _NOTHING_COMPARED,
            ),
            rule(
                "!has(self.cells) || self.cells.all(c, !has(c.output) || !has(c.output.destination) || "
                "self.cells.exists_one(d, has(d.output) && has(d.output.destination) && "
                "d.output.destination == c.output.destination))",
                _ONE_PLACE,
            ),
            rule(
                "self.best != 'score' || (has(self.template.spec.gate) && has(self.template.spec.gate.score))",
                _NO_SCORE,
            ),
            rule(
                "!((has(self.grid) && has(self.grid.seed)) || (has(self.cells) && self.cells.exists(c, has(c.seed)))) "
                "|| self.select == 'all' || !has(self.template.spec.dataset.eval) || "
                "has(self.template.spec.dataset.eval.source)",
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
            rule(
                f"self.publish == 'best' || !has({_OUTPUT}.destination) || "
                f"{_OUTPUT}.destination.matches('^({'|'.join(_WITH_FOLDERS)})://')",
                _ONE_ADAPTER,
            ),
            rule(f"self.publish == 'best' || !has({_OUTPUT}.merged)", _MERGED),
            rule(f"self.publish != 'best' || {_SOMETHING_TO_PUBLISH}", _NOTHING_TO_PUBLISH),
            *rules_of_template("self.template.spec", "self.cellsPerPod == 1", _TOGETHER),
            rule(
                "self.cellsPerPod == 1 || !((has(self.grid) && has(self.grid.dropout) && "
                "self.grid.dropout.exists(d, d > 0.0)) || "
                "(has(self.cells) && self.cells.exists(c, has(c.dropout) && c.dropout > 0.0)))",
                _DROPOUT,
            ),
            rule("self.cellsPerPod == 1 || !has(self.halving)", _STOPPED_TOGETHER),
            rule(f"!has(self.cells) || {_KEEPS_CLAIM} || self.cells.all(c, {_OUTSIDE})", _ON_THE_CLAIM),
        )
    )


class QLoRASweepSpec(ApiModel):
    """Fine-tuning runs that differ in a few fields. Each is a QLoRAJob, a cell."""

    model_config = ConfigDict(json_schema_extra=_sweep_rules)

    template: SweepTemplate = Field(description="The spec that all cells share.")
    grid: Grid | None = Field(None, description="Values of fields: each combination of them is a cell; or set cells.")
    cells: Annotated[tuple[Overrides, ...], Field(min_length=1, max_length=MAX_CELLS)] | None = Field(
        None, description="The cells one by one, each by its changes to the template; or set grid."
    )
    select: Literal["best", "all"] = Field(
        "best",
        description="Which adapters are the result: that of the best cell, which spec.best finds among cells with the "
        "same data (best), or that of each cell, without a comparison (all). With all, cells may also differ in "
        "dataset and output, and the sweep succeeds if all of them do.",
    )
    best: Literal["evalLoss", "score"] = Field(
        "evalLoss",
        description="Measure of the best cell: the lowest loss on the held-out rows (evalLoss), or the highest score "
        "of the template's gate, and the lower loss of two with the same score.",
    )
    publish: Literal["all", "best"] = Field(
        "all",
        description="Which adapters are published to the template's output: that of each cell, to a folder of its "
        "name below output.destination (all), or only that of the best cell, once all have ended (best). With best it "
        "may be any destination, and merged; the adapters of the cells stay in the workspace.",
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
        description="Cells, or pods of cellsPerPod, that run at the same time. More than 1 needs a workspace that "
        "several nodes can mount.",
    )
    cells_per_pod: int = Field(
        1,
        ge=1,
        le=MAX_TOGETHER,
        description="Cells that one pod trains together, on one base: the first so many, then the next. Each is "
        "prepared and published by itself.",
    )
    suspend: bool = Field(
        False, description="true suspends the cells that run and starts no other; false resumes them."
    )
    ttl_seconds_after_finished: TtlSeconds | None = Field(
        None,
        description="Seconds from the end to the deletion of the QLoRASweep with all cells; the profile's if not set, "
        "or never. Clean-ups of cells that are due by then come first.",
    )
    managed_by: ManagedBy | None = Field(
        None,
        description="The controller of this sweep: qlora.dev/operator or not set is this operator, which leaves a "
        "sweep with another value alone.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.grid is None) == (self.cells is None):
            raise ValueError(_ONE_SOURCE)
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        held_out = self.template.spec.dataset.eval
        if self.select == "all":
            if self.halving is not None or self.best == "score" or self.publish == "best":
                raise ValueError(_NOTHING_COMPARED)
            return self
        if held_out is None or not self.template.spec.dataset.holds_out:
            raise ValueError(_NO_EVALUATION)
        gate = self.template.spec.gate
        if self.best == "score" and (gate is None or gate.score is None):
            raise ValueError(_NO_SCORE)
        if any(overrides.dataset or overrides.output for overrides in self.overrides()):
            raise ValueError(_DIFFERENT_DATA)
        seeded = any(overrides.seed is not None for overrides in self.overrides())
        if seeded and held_out.source is None:
            raise ValueError(_OTHER_ROWS)
        return self

    @model_validator(mode="after")
    def _trainable_together(self) -> Self:
        if self.cells_per_pod == 1:
            return self
        if reason := not_together(self.template.spec, _TOGETHER):
            raise ValueError(reason)
        if any(overrides.dropout for overrides in self.overrides()):
            raise ValueError(_DROPOUT)
        if self.halving is not None:
            raise ValueError(_STOPPED_TOGETHER)
        return self

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        output: OutputSpec = self.template.spec.output
        if self.publish == "best":
            if not (output.destination or output.merged or output.base):
                raise ValueError(_NOTHING_TO_PUBLISH)
            return self
        if output.destination is not None and scheme_of(output.destination) not in _WITH_FOLDERS:
            raise ValueError(_ONE_ADAPTER)
        if output.merged is not None:
            raise ValueError(_MERGED)
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
    def _evaluated_at_rungs(self) -> Self:
        training = self.template.spec.training
        if self.halving is None:
            return self
        if training.eval_every_steps is None or self.halving.min_steps % training.eval_every_steps:
            raise ValueError(_NO_RUNG)
        if training.max_steps is not None and self.halving.min_steps >= training.max_steps:
            raise ValueError(_RUNG_AFTER_THE_END)
        return self

    @model_validator(mode="after")
    def _outlives_the_claim(self) -> Self:
        if self.template.spec.workspace.deletes_claim and not self.is_outside_workspace:
            raise ValueError(_ON_THE_CLAIM)
        return self

    @property
    def is_outside_workspace(self) -> bool:
        """Whether no adapter to keep, and no merged model, is left in the workspace."""
        outputs = (self.template.spec.output, *(each.output for each in self.overrides() if each.output is not None))
        return all(output.is_outside_workspace for output in outputs)

    def overrides(self) -> tuple[Overrides, ...]:
        """The changes of each cell, in order."""
        return self.grid.cells() if self.grid is not None else self.cells or ()


class SweepMeta(ObjectMeta):
    """The part of a sweep's metadata that decides its cells."""

    name: str = Field(max_length=MAX_SWEEP_NAME_LENGTH, pattern=DNS_LABEL)


class QLoRASweepDocument(ApiModel):
    """The manifest: what a user applies, and what `qlora plan` takes."""

    api_version: Literal["qlora.dev/v1beta1"]
    kind: Literal["QLoRASweep"]
    metadata: SweepMeta
    spec: QLoRASweepSpec

    @model_validator(mode="after")
    def _has_room_for_best(self) -> Self:
        if self.spec.publish == "best" and len(self.metadata.name) > _MAX_NAME_WITH_BEST:
            raise ValueError(_NAME_WITH_BEST)
        return self


@dataclass(frozen=True)
class Cell:
    """One QLoRAJob of a sweep, before its creation."""

    name: str
    overrides: Overrides
    spec: QLoRAJobSpec


def cells(name: str, spec: QLoRASweepSpec, claim: str) -> tuple[Cell, ...]:
    """Build the cells of the sweep of that name, in their order.

    All use the workspace `claim`; nothing else decides their names and specs. Raises ValueError, naming the cell, if
    its changes do not fit the template or repeat those of another, or if two cells would publish to one place.
    """
    found = tuple(_cells(name, spec, claim))
    for cell, other in combinations(found, 2):
        if place := cell.spec.output.overlap(other.spec.output):
            raise ValueError(
                f"cells {cell.name} and {other.name} would both publish to {place}: give each cell an output that is "
                "not inside that of another"
            )
    return found


def pods(spec: QLoRASweepSpec, found: Sequence[T]) -> list[Sequence[T]]:
    """The cells, by the pod that trains them."""
    size = spec.cells_per_pod
    return [found[first : first + size] for first in range(0, len(found), size)]


def _cells(name: str, spec: QLoRASweepSpec, claim: str) -> Iterator[Cell]:
    known: set[Overrides] = set()
    for number, overrides in enumerate(spec.overrides()):
        cell = f"{name}-{number:02}"
        # The schema compares no lists, and takes 0 and 0.0 for two values.
        if spec.grid is not None and overrides in known:
            raise ValueError(f"cell {cell} ({overrides.text()}) is a duplicate: a list of the grid repeats a value")
        known.add(overrides)
        try:
            yield Cell(cell, overrides, _cell_spec(cell, spec, overrides, claim))
        except ValidationError as error:
            raise ValueError(f"cell {cell} ({overrides.text()}): {explain_first(error, QLoRAJobSpec)}") from error


def _cell_spec(cell: str, spec: QLoRASweepSpec, overrides: Overrides, claim: str) -> QLoRAJobSpec:
    template = spec.template.spec
    content, changes = template.dump(), overrides.dump()
    for alternatives in _ALTERNATIVES:
        if not alternatives.isdisjoint(changes):
            content["training"] = {key: value for key, value in content["training"].items() if key not in alternatives}
    replaced = {field: changes.pop(field) for field in ("dataset", "output") if field in changes}
    for key, value in changes.items():
        content["lora" if key in _OF_LORA else "training"][key] = value
    content["workspace"] = {"claimName": claim}
    destination = template.output.destination
    if spec.publish == "best":
        content["output"] = {}
        # The best cell's job needs the checkpoint after all cells have ended: the sweep sets this then.
        content.pop("cleanupAfterSeconds", None)
    elif destination is not None:
        content["output"]["destination"] = f"{destination.rstrip('/')}/{cell}"
    return QLoRAJobSpec.model_validate(content | replaced)
