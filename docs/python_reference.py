"""Writes the reference of the Python client from its docstrings, which are in Google's style."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

import qlora_client

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
_FIELD = re.compile(r'^    (\w+): (.+)\n(?:    """((?:.|\n)*?)""")?', re.MULTILINE)


def blocks() -> Iterator[str]:
    """The page's blocks of Markdown, below its introduction."""
    for name in qlora_client.__all__:
        kind = getattr(qlora_client, name)
        yield f"## {name}"
        if kind.__init__.__doc__ and not dataclasses.is_dataclass(kind):
            yield _code(f"from qlora_client import {name}\n\n{name}{_signature(kind)}")
        yield from _described(inspect.getdoc(kind) or "")
        if dataclasses.is_dataclass(kind):
            yield _fields(kind)
        for method in vars(kind):
            function = getattr(kind, method)
            if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                yield from _method(method, function, kind)


def _method(name: str, function: Callable[..., Any], kind: type) -> Iterator[str]:
    if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
        return
    if name != "__init__":
        yield f"### {name}"
        yield _code(f"{name}{_signature(function)}")
    # A constructor without a docstring would have that of `object`.
    if function.__doc__:
        yield from _described(inspect.cleandoc(function.__doc__))


def _signature(of: Callable[..., Any]) -> str:
    """The signature without `self`, a parameter a line if there are several."""
    found = inspect.signature(of)
    parameters = [str(each) for each in found.parameters.values() if each.name != "self"]
    keywords = [each for each in found.parameters.values() if each.kind is each.KEYWORD_ONLY]
    if keywords and not any(each.kind is each.VAR_POSITIONAL for each in found.parameters.values()):
        parameters.insert(parameters.index(str(keywords[0])), "*")
    returned = "" if isinstance(of, type) or found.return_annotation is found.empty else f" -> {_plain(found)}"
    lines = "".join(f"    {parameter},\n" for parameter in parameters)
    inner = f"\n{lines}" if len(parameters) > 1 else "".join(parameters)
    return _short(f"({inner}){returned}")


def _plain(signature: inspect.Signature) -> str:
    return inspect.formatannotation(signature.return_annotation)


def _short(text: str) -> str:
    """Types by their last names."""
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text).replace("datetime.datetime", "datetime")
    text = re.sub(r"Optional\[(Literal\[.*?\])\]", r"\1 | None", text).replace("PosixPath", "Path")
    return re.sub(r"<built-in function (\w+)>", r"time.\1", text)


def _described(docstring: str) -> Iterator[str]:
    text, *sections = _SECTION.split(docstring)
    yield text.strip()
    for title, content in zip(sections[::2], sections[1::2], strict=True):
        entries = _ENTRY.findall(content)
        if title == "Returns":
            yield f"Returns: {_line(content)}"
        elif entries:
            heading = {"Args": "Argument", "Attributes": "Field", "Raises": "Error"}[title]
            yield _table(heading, ((name, _line(meaning)) for name, meaning in entries))


def _fields(kind: Any) -> str:
    rows = []
    for name, _, meaning in _FIELD.findall(inspect.getsource(kind)):
        annotation = _short(str(inspect.get_annotations(kind, eval_str=False).get(name, "")))
        shown = re.sub(r"^<class '(.*)'>$", r"\1", annotation)
        rows.append((name, f"{_line(meaning)} `{shown}`".strip()))
    return _table("Field", iter(rows))


def _table(heading: str, rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {heading} | Meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in rows)])


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _line(text: str) -> str:
    return " ".join(text.split())
