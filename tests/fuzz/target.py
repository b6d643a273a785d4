"""The contract of a parser for any bytes, so that hypothesis and atheris can check it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import classify, result_record
from qlora_trainer.core.records import Findings

LONGEST_MESSAGE = 20_000


@dataclass(frozen=True)
class Target:
    """A parser. For any input it returns, or rejects it in one of the documented ways."""

    parse: Callable[[bytes, Path], object]
    """Gets the input, and a folder where it may write files. Asserts what its result must have."""
    seeds: tuple[bytes, ...]
    """Inputs that are taken, to begin with."""
    rejections: tuple[type[Exception], ...] = ()
    exit_codes: tuple[ExitCode, ...] = ()
    """How it may end the step."""

    def check(self, content: bytes, folder: Path) -> None:
        """Parse the content, and check a rejection's message.

        Raises unexpected exceptions, and AssertionError for bad words.
        """
        rejection = self.rejection(content, folder)
        if isinstance(rejection, StepFailure):
            assert rejection.exit_code in self.exit_codes, f"ends with {rejection.exit_code!r}: {rejection.message}"
            assert shown_message(rejection).isprintable()
        assert rejection is None or len(str(rejection)) <= LONGEST_MESSAGE, "the rejection has no end"

    def rejection(self, content: bytes, folder: Path) -> Exception | None:
        """How the content is rejected, or None."""
        allowed: tuple[type[Exception], ...] = (*self.rejections, StepFailure) if self.exit_codes else self.rejections
        try:
            self.parse(content, folder)
        except allowed as rejection:
            return rejection
        return None


def shown_message(failure: StepFailure) -> str:
    """The failure as the status shows it."""
    time, ending = "2026-01-02T12:00:00Z", classify(failure)
    return result_record(
        ending, None, Findings(), step="prepare", job_uid="job", pod_uid="pod", attempt=1, time=time
    ).message


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """The parser of a file, whose path it gets, as one of content."""

    def parse_content(content: bytes, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return parse(path)

    return parse_content


def in_text(parse: Callable[[str], object]) -> Callable[[bytes, Path], object]:
    """The parser of a text as one of content."""
    return lambda content, _folder: parse(content.decode(errors="replace"))


def dumped(value: object) -> bytes:
    """The value in JSON."""
    return json.dumps(value).encode()
