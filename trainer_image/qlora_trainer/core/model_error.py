"""Says what cannot be done with a model, and whose error shows it, where a library raises one without a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from qlora_trainer.core.sandbox import is_out_of_memory

# transformers checks a value where it is first used: it raises any of these for an unusable one.
UNUSABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    OSError,
    StrictDataclassError,
)


class ModelError(Exception):
    """Something cannot be done with a model. The message says what, and ends with a library's error if one shows it."""


@contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Raise ModelError instead of an error of a library: `sentence`, which says what cannot be done, and the error.

    A sentence from inside stays. So does PyTorch's error for memory, which is not the model's fault.
    """
    try:
        yield
    except UNUSABLE as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(with_error(sentence, error)) from error


def with_error(sentence: str, error: Exception) -> str:
    """The sentence, and behind a colon type and text of the error in one line: of a KeyError the text is a key only."""
    return f"{sentence}: {type(error).__name__}: {' '.join(str(error).split())}"
