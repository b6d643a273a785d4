"""Finds the places of the chart's YAML and templates where one small change makes a defect.

Not drawn: comments, notes for people, `description`, `summary`, and lists or maps as a whole.
"""

import re
from collections.abc import Iterator

from tests.mutants.python_changes import Change

_SCALAR = re.compile(r"(?<=[ :\[])(?<!indent )(?:true|false|\d+)(?=[,\s\]}]|$)")
_WORD = re.compile(r"^\s*(?:- )?[\w./-]+: (\"?[\w./:-]+)(?=\"?$)")
_LEAF = re.compile(r"^\s*(?:- (?!\S+:(?: |$))\S.*|[\w./\"-]+: (?![|>{&]).*\S)$")
_CONDITION = re.compile(r"(?<=\{\{- if )[^}]+?(?= -?\}\})|(?<=\{\{- else if )[^}]+?(?= -?\}\})")
_IN_TEMPLATE = re.compile(r"\{\{.*?\}\}")
_OPERATOR = re.compile(r"\b(?:and|or|eq|ne|gt|lt)\b(?= )")
_SWAPPED = {"and": "or", "or": "and", "eq": "ne", "ne": "eq", "gt": "lt", "lt": "gt"}
_FOR_PEOPLE = re.compile(r"^\s*(?:#|\{\{-? ?/\*|(?:description|summary|runbook_url):)")


def chart_changes(file: str, text: str) -> Iterator[Change]:
    """Each change of a file of the chart."""
    lines = text.splitlines(keepends=True)
    start = 0
    for number, line in enumerate(lines, 1):
        if not _FOR_PEOPLE.match(line):
            following = next((other for other in lines[number:] if other.strip()), "")
            for kind, begin, end, new in _of_line(line, following):
                yield Change(file, number, number, kind, start + begin, start + end, new)
        start += len(line)


def _of_line(line: str, following: str) -> Iterator[tuple[str, int, int, str]]:
    """Kind, begin, end and replacement of each change of a line."""
    for found in _SCALAR.finditer(line):
        other = {"true": "false", "false": "true"}.get(found[0]) or str(int(found[0]) + 1)
        yield "constant", *found.span(), other
    if (word := _WORD.match(line.rstrip())) and not _SCALAR.fullmatch(f" {word[1]}", 1):
        yield "constant", *word.span(1), f"{word[1]}x"
    for found in _CONDITION.finditer(line):
        yield "negated condition", *found.span(), f"not ({found[0]})"
    for template in _IN_TEMPLATE.finditer(line):
        for found in _OPERATOR.finditer(line, *template.span()):
            yield "and/or" if found[0] in ("and", "or") else "comparison", *found.span(), _SWAPPED[found[0]]
    if _LEAF.match(line.rstrip()) and _indentation(following) <= _indentation(line):
        yield "dropped line", 0, len(line), ""


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())
