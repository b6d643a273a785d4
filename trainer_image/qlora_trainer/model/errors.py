"""Turns a library's bare exception about a model into a message."""

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
    """A model cannot be used. The message has the reason, and a library's error."""


@contextmanager
def explain_errors(sentence: str) -> Iterator[None]:
    """Raise ModelError for a library's error, except one for lack of memory."""
    try:
        yield
    except UNUSABLE as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(with_error(sentence, error)) from error


def with_error(sentence: str, error: Exception) -> str:
    """The sentence, and type and text of the error, in one line."""
    return f"{sentence}: {type(error).__name__}: {' '.join(str(error).split())}"
