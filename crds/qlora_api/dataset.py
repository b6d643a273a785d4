"""The part of a QLoRAJob's spec that describes the training data."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.model_and_output import Revision, SecretRef
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import TEMPLATE_NAMES, DatasetAddress, TemplateAddress

ColumnName = Annotated[str, Field(min_length=1, max_length=128)]
RowFormat = Literal["chat", "sharegpt", "instruction", "prompt-completion", "text", "preference"]


class Columns(ApiModel):
    """Names of the data set's columns, if they differ from those of the format."""

    messages: ColumnName | None = Field(None, description="Format chat: the list of {role, content}.")
    instruction: ColumnName | None = Field(None, description="Format instruction: the instruction.")
    input: ColumnName | None = Field(None, description="Format instruction: optional further input.")
    output: ColumnName | None = Field(None, description="Format instruction: the answer.")
    prompt: ColumnName | None = Field(
        None,
        description="Format prompt-completion: the prompt. Format preference: the prompt, as text or as a list of "
        "{role, content}; optional where chosen and rejected are whole conversations.",
    )
    completion: ColumnName | None = Field(None, description="Format prompt-completion: the completion.")
    conversations: ColumnName | None = Field(None, description="Format sharegpt: the list of {from, value}.")
    system: ColumnName | None = Field(None, description="Formats sharegpt and instruction: optional system message.")
    tools: ColumnName | None = Field(
        None, description="Formats chat, sharegpt and preference: optional tools (JSON schemas)."
    )
    text: ColumnName | None = Field(None, description="Format text: the text.")
    chosen: ColumnName | None = Field(
        None, description="Format preference: the better answer, as text or as a list of {role, content}."
    )
    rejected: ColumnName | None = Field(None, description="Format preference: the worse answer, like chosen.")


Sha256 = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]

_NO_REPOSITORY = (
    "revision, config and split are for an hf:// data set: for another source, name the file or folder, and set sha256"
)
_NO_OWN_SOURCE = "sha256, revision, config and split are for the evaluation's own source: set source, or remove them"


class EvalSpec(ApiModel):
    """Rows held out for evaluation: from a source of their own, or a fraction of the data set."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.source) != has(self.fraction)", "set exactly one of source and fraction"),
            rule(
                "has(self.source) || "
                "(!has(self.sha256) && !has(self.revision) && !has(self.config) && !has(self.split))",
                _NO_OWN_SOURCE,
            ),
            rule(
                "(!has(self.revision) && !has(self.config) && !has(self.split)) || !has(self.source) || "
                "self.source.startsWith('hf://')",
                _NO_REPOSITORY,
            ),
        )
    )

    source: DatasetAddress | None = Field(
        None, description="Address of the evaluation rows, in the format of the training rows."
    )
    revision: Revision | None = Field(
        None,
        description="Branch, tag or commit of an hf:// source; if not set, dataset.revision for the same repository, "
        "main for another.",
    )
    config: ColumnName | None = Field(
        None,
        description="Configuration (subset) of an hf:// source that has several; if not set, dataset.config for the "
        "same repository, default for another.",
    )
    split: ColumnName | None = Field(
        None, description="Split of an hf:// source that has several; validation, or else test, if not set."
    )
    sha256: Sha256 | None = Field(
        None,
        description="Expected SHA-256 of the evaluation's own data, as for dataset.sha256; not checked if not set.",
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the rows to hold out, chosen by training.seed."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("set exactly one of source and fraction")
        return self

    @model_validator(mode="after")
    def _parts_of_a_source(self) -> Self:
        of_a_repository = self.revision or self.config or self.split
        if self.source is None and (self.sha256 or of_a_repository):
            raise ValueError(_NO_OWN_SOURCE)
        if of_a_repository and not (self.source or "").startswith("hf://"):
            raise ValueError(_NO_REPOSITORY)
        return self


class SystemPromptSpec(ApiModel):
    """A system message for every row. Servers must send the same one: the report and the model card have it."""

    text: str = Field(max_length=16_384, pattern=r"\S", description="The system message.")
    mode: Literal["add", "replace"] = Field(
        "add",
        description="add gives it to the rows that have no system message of their own; replace to all rows, in place "
        "of their own.",
    )


_NO_OBJECTS = "secretRef is for s3:// data; an hf:// data set is read with spec.model.tokenSecretRef"


_TEXT_HAS_NO_TURNS = (
    "chatTemplate and systemPrompt are for rows with turns, and format: text has none: choose another format, or "
    "remove them"
)


class DatasetSpec(ApiModel):
    """The training data: JSONL, JSON, CSV (each optionally compressed) or Parquet, as the file name ends."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.secretRef) || self.source.startsWith('s3://') || "
                "(has(self.eval) && has(self.eval.source) && self.eval.source.startsWith('s3://'))",
                _NO_OBJECTS,
            ),
            rule(
                "(!has(self.revision) && !has(self.config) && !has(self.split)) || self.source.startsWith('hf://')",
                _NO_REPOSITORY,
            ),
            rule(
                "self.format != 'text' || (!has(self.chatTemplate) && !has(self.systemPrompt))",
                _TEXT_HAS_NO_TURNS,
            ),
        )
    )

    source: DatasetAddress = Field(
        description="Address of the rows: hf://ORG/NAME[/PATH], pvc://CLAIM/PATH, s3://BUCKET/PATH or "
        "configMap://NAME/KEY; a .jsonl, .json, .csv (each optionally followed by .gz, .bz2, .xz or .zst) or .parquet "
        "file, or a folder of such files of one kind."
    )
    revision: Revision | None = Field(None, description="Branch, tag or commit of an hf:// data set; main if not set.")
    config: ColumnName | None = Field(
        None, description="Configuration (subset) of an hf:// data set that has several; default if not set."
    )
    secret_ref: SecretRef | None = Field(
        None, description="Credentials for reading s3:// data. Only the prepare step mounts them."
    )
    format: Literal["auto", RowFormat] = Field(
        "auto", description="Format of the rows. auto detects it by the columns and reports it in status.dataset."
    )
    columns: Columns | None = Field(None, description="Names of the columns, if they differ from those of the format.")
    chat_template: TemplateAddress | None = Field(
        None,
        description=f"Chat template that rows are written with, instead of the model's own or where it has none: "
        f"{', '.join(TEMPLATE_NAMES)}, or configMap://NAME/KEY with a template in Jinja. It is published with the "
        "adapter, as chat_template.jinja.",
    )
    system_prompt: SystemPromptSpec | None = Field(
        None, description="A system message for every row; only the rows' own if not set."
    )
    split: ColumnName | None = Field(None, description="Split of an hf:// data set that has several; train if not set.")
    eval: EvalSpec | None = Field(None, description="Rows held out for evaluation; none if not set.")
    max_samples: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Use only this many rows, the first ones; all if not set."
    )
    shuffle: bool = Field(
        False, description="Choose the maxSamples rows at random, by training.seed, instead of using the first ones."
    )
    sha256: Sha256 | None = Field(
        None,
        description="Expected SHA-256 of the data file; for several files, of the lines that sha256sum prints for them "
        "in the order of their names. Not checked if not set.",
    )

    @model_validator(mode="after")
    def _secret_has_a_use(self) -> Self:
        held_out = self.eval.source if self.eval else None
        if self.secret_ref and not any(uri and uri.startswith("s3://") for uri in (self.source, held_out)):
            raise ValueError(_NO_OBJECTS)
        return self

    @model_validator(mode="after")
    def _parts_of_a_repository(self) -> Self:
        if (self.revision or self.config or self.split) and not self.source.startswith("hf://"):
            raise ValueError(_NO_REPOSITORY)
        return self

    @model_validator(mode="after")
    def _text_has_no_turns(self) -> Self:
        if self.format == "text" and (self.chat_template or self.system_prompt):
            raise ValueError(_TEXT_HAS_NO_TURNS)
        return self

    @property
    def template_address(self) -> str | None:
        """Address of the chat template in a ConfigMap; None for one by name, and without any."""
        return None if self.chat_template in (None, *TEMPLATE_NAMES) else self.chat_template
