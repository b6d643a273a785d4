"""The contract of a parser for any bytes, so that hypothesis and atheris can check it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import ExitCode, ResultRecord
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import classify, result_record
from qlora_trainer.core.records import Findings

LONGEST_MESSAGE = 20_000


@dataclass(frozen=True)
class Target:
    """A parser. For any input it returns, or rejects it in one of the documented ways."""

    parse: Callable[[bytes, Path], object]
    """Gets the input, and a folder where it may write files. What it gives back besides is looked at here, too."""
    seeds: tuple[bytes, ...]
    """Inputs that are taken, to begin with."""
    rejections: tuple[type[Exception], ...] = ()
    exit_codes: tuple[ExitCode, ...] = ()
    """How it may end the step."""

    def check(self, content: bytes, folder: Path) -> None:
        """Parse the content. Raises unexpected exceptions, and AssertionError for bad words."""
        rejection = self._rejection(content, folder)
        if isinstance(rejection, StepFailure):
            assert rejection.exit_code in self.exit_codes, f"ends with {rejection.exit_code!r}: {rejection.message}"
            assert _record(rejection).message.isprintable()
        assert rejection is None or len(str(rejection)) <= LONGEST_MESSAGE, "the rejection has no end"

    def _rejection(self, content: bytes, folder: Path) -> Exception | None:
        allowed: tuple[type[Exception], ...] = (*self.rejections, StepFailure) if self.exit_codes else self.rejections
        try:
            self.parse(content, folder)
        except allowed as rejection:
            return rejection
        return None


def _record(failure: StepFailure) -> ResultRecord:
    """The failure as people see it."""
    time = "2026-01-02T12:00:00Z"
    return result_record(
        classify(failure), None, Findings(), step="prepare", job_uid="job", pod_uid="pod", attempt=1, time=time
    )
