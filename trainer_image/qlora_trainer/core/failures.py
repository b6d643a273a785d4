"""Why a step stops: a failure with exit code and message, or a stop request."""

import re
import sys

from qlora_api.contract import ExitCode

# Reports of libraries that find no memory left by PyTorch's allocator: cuBLAS, cuSOLVER, cuDNN (and PyTorch
# about cuDNN), CUDA, its driver, Triton and NCCL. Their errors have no separate type. bitsandbytes raises none: it
# prints a line and ends the process with exit code 1.
_OUT_OF_GPU_MEMORY = re.compile(
    r"(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
    r"|CUDA (driver )?error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|Triton Error \[CUDA\]: out of memory"
    r"|CUDA (ran )?out of memory|Cuda failure (\d+ )?'out of memory'"
)


class StepFailure(Exception):  # noqa: N818 - the step is what fails
    """Ends the step with `exit_code`. The message says what to do."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message

    def __reduce__(self) -> tuple[type["StepFailure"], tuple[ExitCode, str]]:
        """How to pickle it: a worker process sends it to its parent."""
        return type(self), (self.exit_code, self.message)


def bad_configuration(message: str) -> StepFailure:
    """The manifest asks for something that cannot be done."""
    return StepFailure(ExitCode.BAD_CONFIGURATION, message)


def bad_dataset(message: str) -> StepFailure:
    """The data set cannot be used as it is."""
    return StepFailure(ExitCode.BAD_DATASET, message)


def model_unavailable(message: str) -> StepFailure:
    """The base model is missing, gated or forbidden."""
    return StepFailure(ExitCode.MODEL_UNAVAILABLE, message)


def unsafe_artifact(message: str) -> StepFailure:
    """A file that could run code or lead out of its folder."""
    return StepFailure(ExitCode.UNSAFE_ARTIFACT, message)


def unreachable(message: str) -> StepFailure:
    """The hub, the network or a mounted object is missing (yet): worth a retry."""
    return StepFailure(ExitCode.UNREACHABLE, message)


def damaged(message: str) -> StepFailure:
    """A workspace file differs from what was written: disk error or other writer."""
    return StepFailure(ExitCode.INTERNAL_ERROR, message)


def peer_lost(message: str) -> StepFailure:
    """Another node of the job has ended: all nodes restart from the checkpoint."""
    return StepFailure(ExitCode.PEER_LOST, message)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether the GPU is out of memory, by PyTorch or a library below. Loads no torch.

    The only test of that: training halves its micro batches for the errors that end a step as GPU_OUT_OF_MEMORY.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_GPU_MEMORY.search(str(error)) is not None


class Interrupted(Exception):  # noqa: N818 - no error: the step was asked to stop and has saved its state
    """The step stopped on request (exit 143), with the checkpoint of `saved_step`."""

    def __init__(self, training_step: int, total_steps: int, saved_step: int) -> None:
        kept = f"the checkpoint of step {saved_step} is saved" if saved_step else "there was nothing to save yet"
        if saved_step < training_step:
            kept += "; the steps since then are suspect and will be repeated"
        super().__init__(f"interrupted at step {training_step} of {total_steps}; {kept}")
        self.training_step = training_step
        self.total_steps = total_steps


class StopRequest:
    """Set by a signal handler, and read between pieces of work. Loads nothing heavy."""

    def __init__(self) -> None:
        # Not a threading.Event: a handler that interrupts itself would wait for its lock for ever.
        self._requested = False

    def set(self) -> None:
        """Ask the step to save and stop. Can be called again, and in a signal handler."""
        self._requested = True

    @property
    def requested(self) -> bool:
        """Whether the step has been asked to stop."""
        return self._requested
