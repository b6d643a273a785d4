"""Reads the tables of rejected inputs in this folder. Their tags stand for what YAML cannot hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_api.contract import ExitCode

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tagged:
    """A content that is made when it is needed, as `made.py` says for its tag."""

    tag: str
    value: Any
    """The node's: a text, a list of arguments, or an object."""


@dataclass(frozen=True)
class Rejected:
    """A job's input that prepare rejects."""

    name: str
    files: Mapping[str, Any]
    """Contents, or changes, by the paths of files."""
    message: str
    """What the message has in it, or begins with if it begins with pvc://."""
    code: ExitCode
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """What the job says of its data."""


class _Loader(yaml.SafeLoader):
    pass


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.ScalarNode):
        return Tagged(tag, loader.construct_scalar(node))
    if isinstance(node, yaml.SequenceNode):
        return Tagged(tag, loader.construct_sequence(node, deep=True))
    assert isinstance(node, yaml.MappingNode)
    return Tagged(tag, loader.construct_mapping(node, deep=True))


def _times(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    assert isinstance(node, yaml.SequenceNode)
    value, times = loader.construct_sequence(node, deep=True)
    return [value] * times


_Loader.add_multi_constructor("!", _tagged)
_Loader.add_constructor("!times", _times)


def read_table(name: str) -> Any:
    """The table of a file in this folder, with tags as Tagged."""
    return yaml.load((_HERE / name).read_text(), _Loader)


def _data() -> Iterator[Rejected]:
    for address, cases in read_table("data.yaml").items():
        for name, content, message, *more in cases:
            dataset = more[0] if more else {}
            code = ExitCode[more[1]] if len(more) > 1 else ExitCode.BAD_DATASET
            files = content if isinstance(content, dict) else {address: content}
            begins = f"pvc://data/{address}" if message.startswith((" ", ":")) else ""
            source = {"source": f"pvc://data/{address}", **dataset}
            yield Rejected(name, files, f"{begins}{message}", code, source)


DATA = tuple(_data())
"""Data sets: a wrong file, or one that was made to do harm."""
MODELS = tuple(
    Rejected(name, files, message, ExitCode[code]) for name, files, code, message in read_table("models.yaml")
)
"""Models that were made to do harm."""
FIELDS = read_table("fields.yaml")
"""Path, value and problem of each wrong field, of a job and of a sweep."""
MANIFESTS = read_table("manifests.yaml")
"""Name, manifest that it starts from, changes and message of each that the API server and the models reject."""
