"""Decides by program whether an answer is the kubectl command that was asked for.

Two spellings of one command are equal: flags in any order and place, ``-n x``, ``--namespace x`` and ``--namespace=x``,
``deploy/web`` and ``deployment web``. A command among other text counts if it stands on a separate line or between
backticks. Anything else that differs is an error, for a command that is nearly right does something else.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SHORT_FLAGS = {
    "-n": "--namespace",
    "-o": "--output",
    "-l": "--selector",
    "-A": "--all-namespaces",
    "-c": "--container",
    "-f": "--follow",
    "-p": "--previous",
}
FLAGS_WITHOUT_VALUE = frozenset({"--all-namespaces", "--previous", "--follow", "--ignore-daemonsets", "--watch"})
RESOURCES = {
    alias: canonical
    for canonical, aliases in {
        "pod": ("pods", "po"),
        "deployment": ("deployments", "deploy", "deployment.apps"),
        "statefulset": ("statefulsets", "sts"),
        "daemonset": ("daemonsets", "ds"),
        "service": ("services", "svc"),
        "configmap": ("configmaps", "cm"),
        "secret": ("secrets",),
        "ingress": ("ingresses", "ing"),
        "cronjob": ("cronjobs", "cj"),
        "persistentvolumeclaim": ("persistentvolumeclaims", "pvc"),
        "node": ("nodes", "no"),
    }.items()
    for alias in (canonical, *aliases)
}
POD_BY_DEFAULT = frozenset({"logs", "exec", "port-forward"})  # `logs pod/web-0` is `logs web-0`
CODE_SPAN = re.compile(r"`\s*\$?\s*(kubectl\s[^`\n]+)`")
COMMAND_LINE = re.compile(r"^\s*(?:\$\s*)?(kubectl\s.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A kubectl command: words and resources in order, flags as a set."""

    words: tuple[str, ...]
    flags: frozenset[tuple[str, str]]
    shell: tuple[str, ...]  # what follows `--`


@dataclass(frozen=True)
class Score:
    """The share of exactly right answers, and the mean share of right parts (0 to 1)."""

    exact: int
    total: int
    partial: float

    @property
    def share(self) -> float:
        """Exactly right answers, 0 to 1."""
        return self.exact / self.total


def parse(answer: str) -> Command | None:
    """Parse the first kubectl command of an answer, None without complete quotes."""
    found = CODE_SPAN.search(answer) or COMMAND_LINE.search(answer)
    if found is None:
        return None
    try:
        tokens = shlex.split(found.group(1))[1:]
    except ValueError:
        return None
    command, shell = _split_at_double_dash(tokens)
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(command)
    for token in rest:
        if token.startswith("-"):
            name, value = _flag(token)
            if value is None:
                value = "true" if name in FLAGS_WITHOUT_VALUE else next(rest, "")
            flags[name] = value
        else:
            words.extend(_words(token))
    if words[:1] and words[0] in POD_BY_DEFAULT and words[1:2] == ["pod"]:
        del words[1]
    return Command(tuple(words), frozenset(flags.items()), tuple(shell))


def is_right(answer: str, expected: str) -> bool:
    """Whether the answer gives the expected command."""
    command = parse(answer)
    return command is not None and command == parse(expected)


def partial_credit(answer: str, expected: str) -> float:
    """Return parts in both over parts in either, 0 to 1 (1: right answers only)."""
    given, wanted = parse(answer), parse(expected)
    if given is None or wanted is None:
        return 0.0
    if given == wanted:
        return 1.0
    ours, theirs = _parts(given), _parts(wanted)
    union = (ours | theirs).total()
    # The same parts in another order are another command: less than 1 even so.
    return min((ours & theirs).total(), union - 1) / union


def score(answers: Sequence[str], expected: Sequence[str]) -> Score:
    """Score answers against expected commands. Raises ValueError on bad lengths."""
    if len(answers) != len(expected) or not expected:
        raise ValueError(
            f"expected one answer for each of one or more commands, got {len(answers)} for {len(expected)}"
        )
    pairs = list(zip(answers, expected, strict=True))
    return Score(
        exact=sum(is_right(answer, command) for answer, command in pairs),
        total=len(pairs),
        partial=sum(partial_credit(answer, command) for answer, command in pairs) / len(pairs),
    )


def _split_at_double_dash(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Tokens before and after the first ``--``."""
    at = tokens.index("--") if "--" in tokens else len(tokens)
    return tokens[:at], tokens[at + 1 :]


def _flag(token: str) -> tuple[str, str | None]:
    """Return a flag's long name, and its value in ``--a=b``, ``-a=b`` or ``-ab``."""
    name, equals, value = token.partition("=")
    if not token.startswith("--") and len(name) > 2:
        # `-nprod`, `-oyaml`, `-lapp=web`
        name, equals, value = token[:2], "=", token[2:]
    return SHORT_FLAGS.get(name, name), value if equals else None


def _words(token: str) -> list[str]:
    """A positional word in canonical form; ``TYPE/NAME`` becomes two."""
    kind, slash, name = token.partition("/")
    if slash and kind in RESOURCES:
        return [RESOURCES[kind], name]
    return [RESOURCES.get(token, token)]


def _parts(command: Command) -> Counter[tuple[str, str]]:
    words = [("word", word) for word in command.words]
    return Counter([*words, *command.flags, *(("shell", word) for word in command.shell)])
