"""Why a step stops: one exception that carries the exit code and the sentence for the user."""

from qlora_api.contract import ExitCode


class StepFailure(Exception):  # noqa: N818 - a step fails; the exception is how it says so
    """Ends the step with `exit_code`. The message says what was found, what is allowed and what to do."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


def bad_configuration(message: str) -> StepFailure:
    """The manifest asks for something that cannot be done."""
    return StepFailure(ExitCode.BAD_CONFIGURATION, message)


def bad_dataset(message: str) -> StepFailure:
    """The data set cannot be used as it is."""
    return StepFailure(ExitCode.BAD_DATASET, message)


def model_unavailable(message: str) -> StepFailure:
    """The base model is missing, gated or forbidden."""
    return StepFailure(ExitCode.MODEL_UNAVAILABLE, message)


def unsafe_artefact(message: str) -> StepFailure:
    """A file that could run code or lead out of its folder."""
    return StepFailure(ExitCode.UNSAFE_ARTEFACT, message)


def unreachable(message: str) -> StepFailure:
    """The hub, the network or a mounted object is not there (yet): worth another attempt."""
    return StepFailure(ExitCode.UNREACHABLE, message)
