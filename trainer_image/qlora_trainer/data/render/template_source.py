"""Finds a job's chat template: its override, or a multimodal processor's."""

import json
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from qlora_api.sources import ConfigMapSource, parse_source
from qlora_api.spec.dataset import DatasetSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import StepFailure, bad_configuration

TEMPLATE_FILE = "chat_template.jinja"
"""What tokenizers and servers call it."""
MAX_TEMPLATE_BYTES = 2**20
# A base that begins its texts with a mark expects it before a conversation too; another base must not get one.
_BEGIN = "{{- bos_token }}\n"


@dataclass(frozen=True)
class JobTemplate:
    """A chat template in Jinja, used instead of the model's."""

    text: str
    begins: bool = False
    """Whether to begin a text with the begin mark, for a tokenizer that has one."""

    def for_tokenizer(self, *, begins: bool) -> str:
        """The template for a tokenizer. `begins`: texts begin with a mark (bos_token)."""
        return _BEGIN + self.text if self.begins and begins else self.text


def job_template(spec: DatasetSpec, mounts: Mounts) -> JobTemplate | None:
    """The job's template, or None. Raises StepFailure if missing or no short text."""
    if spec.chat_template is None:
        return None
    if spec.template_address is None:
        template = files("qlora_trainer.data").joinpath("templates", f"{spec.chat_template}.jinja")
        return JobTemplate(template.read_text(encoding="utf-8"), begins=True)
    source = parse_source(spec.template_address)
    if not isinstance(source, ConfigMapSource):
        raise bad_configuration(f"spec.dataset.chatTemplate is {spec.chat_template}: must be configMap://NAME/KEY")
    return JobTemplate(_read(mounts.config_map(source), spec.template_address))


def _read(path: Path, address: str) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(content) > MAX_TEMPLATE_BYTES:
        raise bad_configuration(
            f"spec.dataset.chatTemplate: {address} has more than {MAX_TEMPLATE_BYTES} bytes: a chat template is shorter"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise bad_configuration(f"spec.dataset.chatTemplate: {address} is not UTF-8 text ({error})") from error
    if not text.strip():
        raise bad_configuration(
            f"spec.dataset.chatTemplate: {address} is empty: it must hold a chat template in Jinja, as a tokenizer's "
            f"{TEMPLATE_FILE} does"
        )
    return text


def template_sha256(text: str) -> str:
    """SHA-256 of a template, as of the file that it is published as."""
    return sha256(text.encode()).hexdigest()


def is_template_unchanged(spec: DatasetSpec, mounts: Mounts, known: str | None) -> bool:
    """Whether the ConfigMap's template has the SHA-256 `known`, or is gone."""
    if spec.template_address is None:
        return True
    try:
        template = job_template(spec, mounts)
    except StepFailure:
        return True
    return template is None or template_sha256(template.text) == known


PROCESSOR_TEMPLATE = "chat_template.json"
"""Where processors kept their template before chat_template.jinja."""


def has_tokenizer_template(folder: Path) -> bool:
    """Whether the tokenizer in a model's folder has a chat template of its own."""
    if (folder / TEMPLATE_FILE).is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def processor_template(folder: Path) -> str | None:
    """The processor's template, or None. Raises StepFailure BAD_CONFIGURATION."""
    path = folder / PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_TEMPLATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise bad_configuration(
            f"the model's {path.name} is not JSON of at most {MAX_TEMPLATE_BYTES} bytes ({error})"
        ) from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise bad_configuration(f"the model's {path.name} has no chat_template that is text: use another model")
    return template
