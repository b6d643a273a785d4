"""Describes an error of YAML in the words of a manifest: the text found, and the text to write."""

from collections.abc import Sequence

from ruamel.yaml.error import MarkedYAMLError, StreamMark

_BLOCKS = ("<block mapping start>", "<block sequence start>")
_NO_VALUE_HERE = "mapping values are not allowed here"


def describe_notation(error: MarkedYAMLError, content: bytes) -> tuple[int, str]:
    """Return the number of the line to correct, and a sentence about it."""
    lines = content.decode(errors="replace").splitlines()
    problem, context = error.problem or error.context or "not YAML", error.context or ""
    line, begin = _number(error.problem_mark), _number(error.context_mark)
    if problem.startswith("found character '\\t'"):
        return line, "a tab is in front of the text: indent with spaces" + _like_neighbor(lines, line)
    if problem == "could not find expected ':'":
        return begin, "has no ': ' after the name: write `name: value`"
    if context == "while scanning a quoted scalar":
        return begin, "a text in quotes begins here and does not end: close it"
    if context in ("while parsing a flow mapping", "while parsing a flow sequence"):
        return begin, "a [ or { begins here and does not end, or a comma is missing in it"
    if problem == _NO_VALUE_HERE or any(begin_of in problem for begin_of in _BLOCKS):
        found, near = _indentation(lines[line - 1]), _neighbor(lines, line)
        if found != near:
            return line, f"is indented by {found}, its neighbors by {near}: indent fields of the same object equally"
    if problem == _NO_VALUE_HERE:
        return line, "a second ': ' in a line: put the value in quotes"
    return line, problem


def _number(mark: StreamMark | None) -> int:
    return 1 if mark is None else mark.line + 1


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _like_neighbor(lines: Sequence[str], number: int) -> str:
    near = _neighbor(lines, number)
    return f", {near} as its neighbors" if near else ""


def _neighbor(lines: Sequence[str], number: int) -> int:
    """The indentation of the open objects before the line: the one nearest to that of the line."""
    found = _indentation(lines[number - 1])
    levels: list[int] = []
    for line in reversed(lines[: number - 1]):
        text = line.lstrip(" ")
        if not text or text.startswith("#"):
            continue
        level = _indentation(line)
        # The fields of a list's entry begin after its hyphen.
        inner = [level + len(text) - len(text.removeprefix("-").lstrip(" "))] if text.startswith("- ") else []
        levels += [each for each in (*inner, level) if not levels or each < min(levels)]
    return min(levels, key=lambda level: abs(level - found), default=0)
