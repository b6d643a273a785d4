"""Finds the places of a Python module where one small change makes a defect.

Not drawn: docstrings, annotations, `assert`, `__all__`, log calls, f-strings (Python 3.11 does not report their
positions), strings with a space and help texts (they are for people), options of dataclasses, `zip(strict=…)`, and
blocks for type checkers.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_SWAPPED: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
}
_SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SKIPPED_FIELDS = frozenset({"annotation", "bases", "returns", "type_comment"})
_SKIPPED_NODES = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
_TYPING = frozenset({"Literal", "NewType", "TypeVar", "cast"})
_FOR_PEOPLE = frozenset({"description", "examples", "help", "metavar", "short_help", "style", "title"})
_LOGS = frozenset({"logger", "logging", "warnings"})
_WORD = re.compile(r"\S{2,}")
_LARGE = 100
"""From here on, one more or less is hardly ever a defect."""


@dataclass(frozen=True)
class Change:
    """One replacement in a file's text."""

    file: str
    """Path relative to the checkout."""
    line: int
    statement: int
    """The first line of the statement around it."""
    kind: str
    start: int
    """Offset in characters."""
    end: int
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the change."""
        return text[: self.start] + self.new + text[self.end :]


class _Source:
    """A module's text, by the positions of its syntax tree."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.statement = 1
        self._lines = text.encode().splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line.decode()))

    def offset(self, line: int, column: int) -> int:
        """The offset in characters of a position, whose column counts bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        """Begin and end of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def replaced(self, node: ast.expr | ast.stmt | ast.keyword, kind: str, new: str) -> Change:
        """Replace a node."""
        return Change(self.file, node.lineno, self.statement, kind, *self.span(node), new)

    def operator(self, left: ast.expr, right: ast.expr, operator: ast.AST, kind: str) -> Iterator[Change]:
        """Replace the operator between two operands."""
        old, new = _SWAPPED.get(type(operator), ("", ""))
        begin, end = self.span(left)[1], self.span(right)[0]
        between = self.text[begin:end]
        if old and between.count(old) == 1:
            start = begin + between.index(old)
            line = left.lineno + self.text.count("\n", self.span(left)[0], start)
            yield Change(self.file, line, self.statement, kind, start, start + len(old), new)


def python_changes(file: str, text: str) -> Iterator[Change]:
    """Each change of a module, of which some no longer parse."""
    source = _Source(file, text)
    for node, source.statement in _drawn(ast.parse(text), 1):
        yield from _of_node(source, node)


def parses(text: str) -> bool:
    """Whether it is a module."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _drawn(node: ast.AST, statement: int) -> Iterator[tuple[ast.AST, int]]:
    """The node and all below it that may be changed, with the first line of the statement around each."""
    if isinstance(node, _SKIPPED_NODES) or _is_for_people(node):
        return
    if isinstance(node, ast.stmt):
        statement = node.lineno
    yield node, statement
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED_FIELDS or (field == "body" and _is_a_guarded_block(node)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (field == "decorator_list" and "dataclass" in ast.unparse(child)):
                yield from _drawn(child, statement)


def _is_for_people(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.keyword(arg=name):
            return name in _FOR_PEOPLE or name == "strict"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name))):
            return name in _LOGS
        case ast.Call(func=ast.Name(id=name)) | ast.Subscript(value=ast.Name(id=name)):
            return name in _TYPING
        case _:
            return False


def _is_a_guarded_block(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:` or `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and bool(re.search(r"\b(TYPE_CHECKING|__name__)\b", ast.unparse(node.test)))


def _of_node(source: _Source, node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare() | ast.BoolOp() | ast.BinOp():
            yield from _of_operation(source, node)
        case ast.Constant():
            yield from _of_constant(source, node)
        case ast.Call():
            yield from _of_call(source, node)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.match_case(guard=ast.expr() as test):
            yield from _of_condition(source, test, (True, False))
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield from _of_condition(source, test, (True,))
        case ast.stmt():
            yield from _of_statement(source, node)


def _of_operation(source: _Source, node: ast.Compare | ast.BoolOp | ast.BinOp) -> Iterator[Change]:
    match node:
        case ast.Compare(left=left, ops=operators, comparators=right):
            for (one, other), operator in zip(pairwise([left, *right]), operators, strict=True):
                yield from source.operator(one, other, operator, "comparison")
        case ast.BoolOp(op=operator, values=values):
            for one, other in pairwise(values):
                yield from source.operator(one, other, operator, "and/or")
            for dropped in values:
                rest = [value for value in values if value is not dropped]
                kept = ast.BoolOp(operator, rest) if len(rest) > 1 else rest[0]
                yield source.replaced(node, "dropped operand", f"({ast.unparse(kept)})")
        case ast.BinOp(left=left, op=operator, right=right):
            yield from source.operator(left, right, operator, "arithmetic")


def _of_condition(source: _Source, test: ast.expr, outcomes: tuple[bool, ...]) -> Iterator[Change]:
    """Negate the condition, or fix its outcome and keep what it assigns."""
    if isinstance(test, ast.Constant) or re.search(r"\b(TYPE_CHECKING|__name__)\b", ast.unparse(test)):
        return
    start, end = source.span(test)
    old = source.text[start:end]
    yield source.replaced(test, "negated condition", f"not ({old})")
    for outcome in outcomes:
        kept = f"({old}) {'or' if outcome else 'and'} " if ":=" in old else ""
        yield source.replaced(test, "dropped condition", f"{kept}{outcome}")


def _of_constant(source: _Source, node: ast.Constant) -> Iterator[Change]:
    match node.value:
        case bool():
            yield source.replaced(node, "constant", str(not node.value))
        case int() if abs(node.value) < _LARGE:
            yield source.replaced(node, "off by one", str(node.value + 1))
            yield source.replaced(node, "off by one", f"({node.value - 1})")
        case int() | float():
            yield source.replaced(node, "constant", repr(node.value * 2 or 1.0))
        case str() if _WORD.fullmatch(node.value):
            yield source.replaced(node, "constant", repr(f"{node.value}x"))


def _of_call(source: _Source, node: ast.Call) -> Iterator[Change]:
    if isinstance(node.func, ast.Name) and node.func.id in _SWAPPED_NAMES:
        yield source.replaced(node.func, "min/max", _SWAPPED_NAMES[node.func.id])
    for keyword in node.keywords:
        if keyword.arg is not None and not _is_for_people(keyword):
            start, end = source.span(keyword)
            comma = re.match(r"\s*,\s*", source.text[end:])
            end += len(comma[0]) if comma else 0
            yield Change(source.file, keyword.lineno, source.statement, "dropped keyword", start, end, "")


def _of_statement(source: _Source, node: ast.stmt) -> Iterator[Change]:
    match node:
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield source.replaced(value, "return value", "None")
        case ast.Expr(value=ast.Call() as call) | ast.Expr(value=ast.Await(value=ast.Call() as call)):
            if not _is_for_people(call):
                yield source.replaced(node, "removed statement", "pass")
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield source.replaced(node, "removed statement", "pass")
        case ast.AugAssign() | ast.Delete() | ast.Raise() | ast.Continue() | ast.Break():
            yield source.replaced(node, "removed statement", "pass")
