"""The part of a QLoRAJob's spec with the conditions for publishing an adapter."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import DatasetAddress
from qlora_api.spec.dataset import PARTS_OF_A_REPOSITORY, HeldOutSource

MAX_PROMPT_TOKENS = 1024
"""A longer prompt is not answered, for a score or a sample."""
MAX_GUARDS = 4
MAX_BENCHMARKS = 4
MAX_SCHEMA_CHARACTERS, MAX_PATTERN_CHARACTERS = 8192, 1024

_SCHEMA_IS_FOR_JSON = "only check jsonSchema needs schema: set check to jsonSchema, or remove schema"
_PATTERN_IS_FOR_REGEX = "only check regex needs pattern: set check to regex, or remove pattern"


class ScoreSpec(ApiModel):
    """How answers to held-out rows are scored: the share (0 to 1) that passes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.schema) || self.check == 'jsonSchema'", _SCHEMA_IS_FOR_JSON),
            rule("!has(self.pattern) || self.check == 'regex'", _PATTERN_IS_FOR_REGEX),
        )
    )

    check: Literal["exactMatch", "jsonSchema", "regex"] = Field(
        description="Rule for answers: the row's answer, apart from white space at both ends (exactMatch); "
        "JSON that a schema allows (jsonSchema); or text with a match of a pattern (regex). Schema and pattern are "
        "the same for all rows, or those of each row (dataset.columns.check). Reasoning up to </think> is ignored. "
        "An answer has not passed if its reasoning does not end, or if its check takes more than two seconds of "
        "computing."
    )
    json_schema: Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_CHARACTERS)] | None = Field(
        default=None,
        alias="schema",
        description="Check jsonSchema: the schema, as JSON text; draft 2020-12 if $schema does not name another. It "
        "may refer to parts of itself ($ref), not to other documents. Not set if each row has one.",
    )
    pattern: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARACTERS)] | None = Field(
        default=None,
        description="Check regex: a regular expression of Python's re, found anywhere in the answer unless anchored. "
        "Not set if each row has one.",
    )
    rows: int = Field(
        default=100,
        ge=1,
        le=1000,
        description="Maximal number of held-out rows that the base and the adapter answer. Their content "
        "decides the selection, so it is the same for every seed.",
    )
    max_new_tokens: int = Field(default=128, ge=1, le=1024, description="Tokens of the longest answer.")

    @model_validator(mode="after")
    def _own_fields_of_the_check(self) -> Self:
        if self.json_schema is not None and self.check != "jsonSchema":
            raise ValueError(_SCHEMA_IS_FOR_JSON)
        if self.pattern is not None and self.check != "regex":
            raise ValueError(_PATTERN_IS_FOR_REGEX)
        return self

    @property
    def of_rows(self) -> bool:
        """Whether each row brings the schema or pattern for its answer."""
        return self.check != "exactMatch" and self.json_schema is None and self.pattern is None


_NO_LIMIT = "set at least one of maxLossIncrease and minScore"


class GuardSpec(HeldOutSource):
    """Further held-out rows, for what the base can do and an adapter must not lose."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.maxLossIncrease) || has(self.minScore)", _NO_LIMIT), PARTS_OF_A_REPOSITORY
        )
    )

    name: str = Field(
        max_length=32,
        pattern=DNS_LABEL,
        description="Name of the guard, in the status and in messages.",
    )
    source: DatasetAddress = Field(
        description="Address of the rows, in the format of the training rows; of a mix's first source. Read with the "
        "credentials of the data set."
    )
    max_loss_increase: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="By how much the loss of the adapter may be above that of its base, in nats per target token.",
    )
    min_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The lowest score of the adapter's answers to these rows, which gate.score checks like those to "
        "the held-out rows.",
    )

    @property
    def rows(self) -> HeldOutSource:
        """The rows, without the limits."""
        return HeldOutSource(**{name: getattr(self, name) for name in HeldOutSource.model_fields})

    @model_validator(mode="after")
    def _requires_something(self) -> Self:
        if self.max_loss_increase is None and self.min_score is None:
            raise ValueError(_NO_LIMIT)
        return self


class BenchmarkSpec(ApiModel):
    """A task of lm-evaluation-harness, answered by the adapter and by its base."""

    task: str = Field(
        max_length=64,
        pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$",
        description="Name of the task, in the folder of tasks of the profile's evaluation.",
    )
    metric: str = Field(
        default="acc",
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_@.-]*(,[A-Za-z0-9_.-]+)?$",
        description="The task's metric, of 0 to 1 and better if higher; METRIC,FILTER if the task has filters.",
    )
    rows: int = Field(default=200, ge=1, le=100_000, description="Maximal number of the task's rows, from the first.")
    min_score: float | None = Field(default=None, ge=0, le=1, description="The lowest score of the adapter.")
    max_drop: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="By how much the adapter's score may be below that of its base: 0.02 is two points of 100.",
    )


_EMPTY = "set at least one of minImprovement, maxEvalLoss, minScore, score, guards and benchmarks"
_NEEDS_SCORE = "minScore needs score, which says how answers are checked: set it, or remove minScore"
_SAME_NAME = "guards have different names: rename one"
_SAME_TASK = "benchmarks have different tasks: remove one"


class GateSpec(ApiModel):
    """Conditions for publishing.

    An adapter that does not pass is not published, and the job fails (GateFailed).
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.minImprovement) || has(self.maxEvalLoss) || has(self.minScore) || has(self.score) || "
                "has(self.guards) || has(self.benchmarks)",
                _EMPTY,
            ),
            rule(
                "has(self.score) || (!has(self.minScore) && (!has(self.guards) || "
                "!self.guards.exists(guard, has(guard.minScore))))",
                _NEEDS_SCORE,
            ),
        )
    )

    min_improvement: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Minimal fall of the held-out loss, as a share of the loss before training: 0.1 is 10 percent.",
    )
    max_eval_loss: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="The highest held-out loss (natural log): per target token, or per pair if the objective compares "
        "answers.",
    )
    min_score: float | None = Field(default=None, ge=0, le=1, description="The lowest score of the adapter's answers.")
    score: ScoreSpec | None = Field(
        default=None,
        description="How answers are scored, at the end of the train step; not scored if not set. Fixed once the job "
        "exists. Without minScore the score is reported and requires nothing.",
    )
    guards: tuple[GuardSpec, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_GUARDS,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Further held-out rows, for what the base can do and the adapter must not lose. Fixed once the "
        "job exists, except the limits.",
    )
    benchmarks: tuple[BenchmarkSpec, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_BENCHMARKS,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["task"]},
        description="Tasks of lm-evaluation-harness that adapter and base answer at the end of the train step, for "
        "what no held-out rows of the job show. Fixed once the job exists, except the limits; without limits only "
        "reported.",
    )

    @model_validator(mode="after")
    def _requires_something(self) -> Self:
        if self.model_dump(exclude_none=True) == {}:
            raise ValueError(_EMPTY)
        if self.score is None and {self.min_score, *(guard.min_score for guard in self.guards or ())} != {None}:
            raise ValueError(_NEEDS_SCORE)
        if len({guard.name for guard in self.guards or ()}) < len(self.guards or ()):
            raise ValueError(_SAME_NAME)
        if len({benchmark.task for benchmark in self.benchmarks or ()}) < len(self.benchmarks or ()):
            raise ValueError(_SAME_TASK)
        return self

    @property
    def judges_evaluation(self) -> bool:
        """Whether the rows of dataset.eval decide, or are answered, and not guards alone."""
        return any(part is not None for part in (self.min_improvement, self.max_eval_loss, self.score))

    @property
    def measured(self) -> tuple[object, ...]:
        """What training measures, which is fixed: the score, and each guard and benchmark without its limits."""
        guards = ((guard.name, guard.rows, guard.min_score is not None) for guard in self.guards or ())
        benchmarks = ((each.task, each.metric, each.rows) for each in self.benchmarks or ())
        return self.score, tuple(sorted(guards, key=lambda guard: guard[0])), tuple(sorted(benchmarks))
