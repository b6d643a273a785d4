"""Reads our Dockerfiles: the pinned base, the labels, and the purpose of each layer of the last stage."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from release.project import ReleaseError

_PINNED = re.compile(r"[\w.-]+(/[\w.-]+)+:[\w.-]+@sha256:[0-9a-f]{64}")
# Those that add a layer; the others change the image's configuration only.
_ADD_LAYERS = ("COPY", "ADD", "RUN")
# A command in a RUN instruction that takes files away, and how it begins.
_REMOVAL = re.compile(r"&& (rm|find) ")


@dataclass(frozen=True)
class Removal:
    """Files removed from a layer: the command, and the reason."""

    command: str
    reason: str


@dataclass(frozen=True)
class Layers:
    """A layer of one or more instructions: its purpose, and the files removed from it."""

    purpose: str
    instructions: tuple[str, ...]
    removals: tuple[Removal, ...]


def base_image(dockerfile: str) -> str:
    """Return the default of BASE_IMAGE. Raises ReleaseError unless pinned by digest."""
    found = re.findall(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    if len(found) != 1 or not _PINNED.fullmatch(found[0]):
        raise ReleaseError(f"ARG BASE_IMAGE: found {found}, expected one REGISTRY/NAME:TAG@sha256:DIGEST")
    return str(found[0])


def labels(dockerfile: str) -> dict[str, str]:
    """The labels of the last stage."""
    return dict(re.findall(r'([\w.]+)="([^"]*)"', "\n".join(_last_stage(dockerfile))))


def layers(dockerfile: str) -> list[Layers]:
    """The layers of the last stage, in order. A comment is for all instructions up to the next comment.

    Raises ReleaseError where a layer or a removal has no comment.
    """
    found: list[Layers] = []
    for comment, instruction in _instructions(_last_stage(dockerfile)):
        if not instruction.startswith(_ADD_LAYERS):
            continue
        if comment:
            found.append(Layers(comment, (), ()))
        elif not found:
            raise ReleaseError(f"no comment says what this layer is for: {instruction.splitlines()[0]}")
        last = found[-1]
        removals = (*last.removals, *_removals(instruction))
        found[-1] = Layers(last.purpose, (*last.instructions, instruction), removals)
    return found


def left_out_packages(dockerfile: str) -> str:
    """Return the comment of the instruction that lists omitted packages."""
    for comment, instruction in _instructions(dockerfile.splitlines()):
        if "--no-emit-package" in instruction:
            return comment
    raise ReleaseError("no instruction with --no-emit-package")


def _last_stage(dockerfile: str) -> list[str]:
    lines = dockerfile.splitlines()
    return lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) + 1 :]


def _instructions(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each instruction, continued lines included, with the comment above it."""
    comment: list[str] = []
    instruction: list[str] = []
    for line in lines:
        if instruction or not line.startswith("#"):
            instruction += [line] if line.strip() else []
        else:
            comment.append(line.removeprefix("#").strip())
        if instruction and not line.endswith("\\") and not line.strip().startswith("#"):
            yield " ".join(comment), "\n".join(instruction)
            comment, instruction = [], []


def _removals(instruction: str) -> Iterator[Removal]:
    reason: list[str] = []
    removed = False
    for line in instruction.splitlines():
        text = line.strip().removesuffix("\\").strip()
        if text.startswith("#"):
            reason = [] if removed else reason
            reason.append(text.removeprefix("#").strip())
            removed = False
        elif _REMOVAL.match(text) and "/var/" not in text:
            if not reason:
                raise ReleaseError(f"no comment says why nothing misses this: {text.removeprefix('&& ')}")
            removed = True
            yield Removal(text.removeprefix("&& "), " ".join(reason))
        else:
            reason = []
