"""The part of a QLoRAJob's spec that describes the training data."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import (
    OBJECT_STORES,
    TEMPLATE_NAMES,
    DatasetAddress,
    TemplateAddress,
    examples,
    prefixes,
)
from qlora_api.spec.model import Revision, SecretRef

ColumnName = Annotated[str, Field(min_length=1, max_length=128)]
MAX_MIX_SOURCES = 16
RowFormat = Literal["chat", "sharegpt", "instruction", "prompt-completion", "text", "preference"]


class Columns(ApiModel):
    """Names of the data set's columns, if they differ from those of the format."""

    messages: ColumnName | None = Field(default=None, description="Format chat: the list of {role, content}.")
    instruction: ColumnName | None = Field(default=None, description="Format instruction: the instruction.")
    input: ColumnName | None = Field(default=None, description="Format instruction: optional further input.")
    output: ColumnName | None = Field(default=None, description="Format instruction: the answer.")
    prompt: ColumnName | None = Field(
        default=None,
        description="Format prompt-completion: the prompt. Format preference: the prompt, as text, as a list of "
        "{role, content}, or as an object with messages and tools; optional where chosen and rejected are whole "
        "conversations.",
    )
    completion: ColumnName | None = Field(default=None, description="Format prompt-completion: the completion.")
    conversations: ColumnName | None = Field(default=None, description="Format sharegpt: the list of {from, value}.")
    system: ColumnName | None = Field(
        default=None, description="Formats sharegpt and instruction: optional system message."
    )
    tools: ColumnName | None = Field(
        default=None, description="Formats chat, sharegpt and preference: optional tools (JSON schemas)."
    )
    text: ColumnName | None = Field(default=None, description="Format text: the text.")
    chosen: ColumnName | None = Field(
        default=None,
        description="Format preference: the better answer, as text or as a list of {role, content}. The columns of "
        "OpenAI's rows (input, preferred_output, non_preferred_output) need no names.",
    )
    rejected: ColumnName | None = Field(default=None, description="Format preference: the worse answer, like chosen.")
    check: ColumnName | None = Field(
        default=None,
        description="Any format with answers: the row's own check for gate.score, a regular expression as text, or a "
        "JSON schema as text or object. Every row that may be held out must have one.",
    )


Sha256 = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]

_NO_REPOSITORY = (
    "revision, config and split are for an hf:// data set: for another source, name the file or folder, and set sha256"
)
_SETS_NO_PART = "(!has(self.revision) && !has(self.config) && !has(self.split))"
PARTS_OF_A_REPOSITORY = rule(f"{_SETS_NO_PART} || self.source.startsWith('hf://')", _NO_REPOSITORY)
"""For a type that requires a source."""
_NO_OWN_SOURCE = "sha256, revision, config and split are for the evaluation's own source: set source, or remove them"


class HeldOutSource(ApiModel):
    """The part of an address whose rows are held out, and its digest."""

    source: DatasetAddress | None = Field(default=None, description="Address of the rows.")
    revision: Revision | None = Field(
        default=None,
        description="Branch, tag or commit of an hf:// source; if not set, that of the training rows for the same "
        "repository, main for another.",
    )
    config: ColumnName | None = Field(
        default=None,
        description="Configuration (subset) of an hf:// source that has several; if not set, that of the training rows "
        "for the same repository, default for another.",
    )
    split: ColumnName | None = Field(
        default=None, description="Split of an hf:// source that has several; validation, or else test, if not set."
    )
    sha256: Sha256 | None = Field(
        default=None,
        description="Expected SHA-256 of the data at source, as for dataset.sha256; not checked if not set.",
    )

    @model_validator(mode="after")
    def _parts_of_a_repository(self) -> Self:
        if self.source and (self.revision or self.config or self.split) and not self.source.startswith("hf://"):
            raise ValueError(_NO_REPOSITORY)
        return self


class EvalSpec(HeldOutSource):
    """Rows held out for evaluation: of another source, or a fraction of the data set."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.source) != has(self.fraction)", "set exactly one of source and fraction"),
            rule(
                "has(self.source) || "
                "(!has(self.sha256) && !has(self.revision) && !has(self.config) && !has(self.split))",
                _NO_OWN_SOURCE,
            ),
            rule(f"{_SETS_NO_PART} || !has(self.source) || self.source.startsWith('hf://')", _NO_REPOSITORY),
        )
    )

    source: DatasetAddress | None = Field(
        default=None,
        description="Address of the evaluation rows, in the format of the training rows; of a mix's first source.",
    )
    fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction of the rows to hold out, of each source of a mix, by training.seed; 0 for none.",
    )
    overlap: Literal["report", "fail", "drop"] | None = Field(
        default=None,
        description="Treatment of rows that are trained on and also held out, token for token: report counts them "
        "in status.dataset.overlapRows, fail fails the job, drop leaves them out of training; report if not set.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("set exactly one of source and fraction")
        return self

    @model_validator(mode="after")
    def _parts_of_a_source(self) -> Self:
        if self.source is None and (self.sha256 or self.revision or self.config or self.split):
            raise ValueError(_NO_OWN_SOURCE)
        return self


class SystemPromptSpec(ApiModel):
    """A system message for every row.

    Servers must send the same one: the report and the model card have it.
    """

    text: str = Field(max_length=16_384, pattern=r"\S", description="The system message.")
    mode: Literal["add", "replace"] = Field(
        default="add",
        description="add gives it to the rows without a system message; replace to all rows, in place of theirs.",
    )


_ROWS_ADDRESS = (
    f"Address of the rows: hf://ORG/NAME[/PATH], {', '.join(examples('pvc', *OBJECT_STORES))} or "
    "configMap://NAME/KEY; a .jsonl, .json, .csv (each optionally followed by .gz, .bz2, .xz "
    "or .zst) or .parquet file, or a folder of such files of one kind."
)
_REVISION = "Branch, tag or commit of an hf:// data set; main if not set."
_CONFIG = "Configuration (subset) of an hf:// data set that has several; default if not set."
_SPLIT = "Split of an hf:// data set that has several; train if not set."
_FORMAT = "Format of the rows. auto detects it by the columns and reports it in status.dataset."
_COLUMNS = "Names of the columns, if they differ from those of the format."
_SHA256 = (
    "Expected SHA-256 of the data file; for several files, of the lines that sha256sum prints for them in the order of "
    "their names. Not checked if not set."
)


class MixSource(ApiModel):
    """One of the sources whose rows are mixed."""

    model_config = ConfigDict(json_schema_extra=rules(PARTS_OF_A_REPOSITORY))

    source: DatasetAddress = Field(description=_ROWS_ADDRESS)
    weight: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Share of the rows of each epoch, relative to the weights of the other sources. Set it for all "
        "sources or for none: without weights each row is in each epoch once.",
    )
    revision: Revision | None = Field(default=None, description=_REVISION)
    config: ColumnName | None = Field(default=None, description=_CONFIG)
    split: ColumnName | None = Field(default=None, description=_SPLIT)
    format: Literal["auto", RowFormat] = Field(default="auto", description=_FORMAT)
    columns: Columns | None = Field(default=None, description=_COLUMNS)
    sha256: Sha256 | None = Field(default=None, description=_SHA256)

    @model_validator(mode="after")
    def _parts_of_a_repository(self) -> Self:
        if (self.revision or self.config or self.split) and not self.source.startswith("hf://"):
            raise ValueError(_NO_REPOSITORY)
        return self


_TEXT_HAS_NO_TURNS = (
    "chatTemplate and systemPrompt are for rows with turns, and format: text has none: choose another format, or "
    "remove them"
)
_ONE_OR_A_MIX = "set exactly one of source and mix"
_OF_EACH_SOURCE = (
    "revision, config, split, format, columns and sha256 are for source: in a mix, set them for each of its sources"
)
_NO_MAX_ROWS_OF_A_MIX = "maxRows and shuffle are for source: a mix draws its rows by weight, in each epoch anew"
_ALL_WEIGHTS_OR_NONE = "set the weight of every source of the mix, or of none"


class DatasetSpec(ApiModel):
    """The training data: JSONL, JSON, CSV (also compressed) or Parquet, by file name."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.source) != has(self.mix)", _ONE_OR_A_MIX),
            rule(f"!has(self.source) || {_SETS_NO_PART} || self.source.startsWith('hf://')", _NO_REPOSITORY),
            rule(
                "!has(self.mix) || (!has(self.revision) && !has(self.config) && !has(self.split) && "
                "self.format == 'auto' && !has(self.columns) && !has(self.sha256))",
                _OF_EACH_SOURCE,
            ),
            rule("!has(self.mix) || (!has(self.maxRows) && !self.shuffle)", _NO_MAX_ROWS_OF_A_MIX),
            rule(
                "!has(self.mix) || self.mix.all(part, has(part.weight)) || !self.mix.exists(part, has(part.weight))",
                _ALL_WEIGHTS_OR_NONE,
            ),
            rule(
                "self.format != 'text' || (!has(self.chatTemplate) && !has(self.systemPrompt))",
                _TEXT_HAS_NO_TURNS,
            ),
        )
    )

    source: DatasetAddress | None = Field(default=None, description=f"{_ROWS_ADDRESS} Set either source or mix.")
    mix: tuple[MixSource, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_MIX_SOURCES,
        description="Several sources instead of one. An epoch has as many rows as all of them have together; each "
        "source gives its share by weight, drawn again in each epoch by training.seed.",
    )
    revision: Revision | None = Field(default=None, description=_REVISION)
    config: ColumnName | None = Field(default=None, description=_CONFIG)
    secret_ref: SecretRef | None = Field(
        default=None,
        description=f"Credentials for reading {prefixes(OBJECT_STORES)} data. Only the prepare step mounts them.",
    )
    format: Literal["auto", RowFormat] = Field(default="auto", description=_FORMAT)
    columns: Columns | None = Field(default=None, description=_COLUMNS)
    chat_template: TemplateAddress | None = Field(
        default=None,
        description=f"Chat template that rows are written with, instead of the model's own or where it has none: "
        f"{', '.join(TEMPLATE_NAMES)}, or configMap://NAME/KEY with a template in Jinja. It is published with the "
        "adapter, as chat_template.jinja.",
    )
    system_prompt: SystemPromptSpec | None = Field(
        default=None, description="A system message for every row; only the rows' own if not set."
    )
    split: ColumnName | None = Field(default=None, description=_SPLIT)
    eval: EvalSpec | None = Field(
        default=None,
        description="Rows held out for evaluation. Automatic: of 100 rows or more 10 percent, 10 to 500; of fewer only "
        "for keep: best, earlyStopping or evalEverySteps.",
    )
    max_rows: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Use only this many rows, the first ones; all if not set."
    )
    shuffle: bool = Field(
        default=False,
        description="Choose the maxRows rows at random, by training.seed, instead of using the first ones.",
    )
    deduplicate: bool | None = Field(
        default=None,
        description="Leave out training rows whose tokens are those of an earlier row, also of another source of the "
        "mix; they are trained on if not set. status.dataset.duplicateRows counts them in any case. Rows of "
        "eval.source that are equal to an earlier one there are left out too.",
    )
    sha256: Sha256 | None = Field(default=None, description=_SHA256)

    @property
    def training_sources(self) -> Mapping[str, MixSource]:
        """Return the sources of the rows by the path of their fields: mix, or one source."""
        if self.mix is not None:
            return {f"spec.dataset.mix[{number}]": part for number, part in enumerate(self.mix)}
        if self.source is None:
            raise AssertionError("a validated data set has a source or a mix")
        names = ("source", "revision", "config", "split", "format", "columns", "sha256")
        return {"spec.dataset": MixSource(**{name: getattr(self, name) for name in names})}

    def check_column(self, field: str) -> str | None:
        """The column with the checks of the rows of the training source that `field` names.

        None if the evaluation has another source: rows that are not held out need no check.
        """
        columns = self.training_sources[field].columns
        apart = self.eval is not None and self.eval.source is not None
        return None if columns is None or apart else columns.check

    @property
    def holds_out(self) -> bool:
        """Whether the job asks for held-out rows."""
        return self.eval is not None and self.eval.fraction != 0

    @property
    def addresses(self) -> Mapping[str, str]:
        """The addresses that are read, by the path of their fields in the job."""
        training = {f"{field}.source": part.source for field, part in self.training_sources.items()}
        held_out = self.eval.source if self.eval else None
        return training if held_out is None else {**training, "spec.dataset.eval.source": held_out}

    @model_validator(mode="after")
    def _source_or_mix(self) -> Self:
        if (self.source is None) == (self.mix is None):
            raise ValueError(_ONE_OR_A_MIX)
        return self

    @model_validator(mode="after")
    def _settings_of_a_mix(self) -> Self:
        if self.mix is None:
            return self
        if self.revision or self.config or self.split or self.columns or self.sha256 or self.format != "auto":
            raise ValueError(_OF_EACH_SOURCE)
        if self.max_rows is not None or self.shuffle:
            raise ValueError(_NO_MAX_ROWS_OF_A_MIX)
        if len({part.weight is None for part in self.mix}) > 1:
            raise ValueError(_ALL_WEIGHTS_OR_NONE)
        return self

    @model_validator(mode="after")
    def _parts_of_a_repository(self) -> Self:
        of_a_repository = self.revision or self.config or self.split
        if self.source is not None and of_a_repository and not self.source.startswith("hf://"):
            raise ValueError(_NO_REPOSITORY)
        return self

    @model_validator(mode="after")
    def _text_has_no_turns(self) -> Self:
        if self.format == "text" and (self.chat_template or self.system_prompt):
            raise ValueError(_TEXT_HAS_NO_TURNS)
        return self

    @property
    def template_address(self) -> str | None:
        """Address of the chat template in a ConfigMap, None for one by name or without."""
        return None if self.chat_template in (None, *TEMPLATE_NAMES) else self.chat_template
