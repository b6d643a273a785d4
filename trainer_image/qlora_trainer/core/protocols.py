"""The parts of other libraries' objects that the trainer uses, for packages that start without PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeAlias, TypeVar, overload

from pydantic import JsonValue

JsonObject: TypeAlias = dict[str, JsonValue]
"""A parsed JSON object. `Mapping[str, JsonValue]` is one that is only read."""
TensorT = TypeVar("TensorT", covariant=True)


class FastTokenizer(Protocol):
    """A tokenizer of transformers that reports the characters of each token."""

    chat_template: str | Mapping[str, str] | None

    @property
    def is_fast(self) -> bool:
        """Whether it reports offsets."""

    @property
    def eos_token(self) -> str:
        """The end-of-text token."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token, or None without one."""

    @property
    def bos_token_id(self) -> int | None:
        """The id of the begin-of-text token, or None without one."""

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens."""

    @overload
    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = ...,
        return_offsets_mapping: bool = ...,
        return_attention_mask: bool = ...,
        return_token_type_ids: bool = ...,
        verbose: bool = ...,
    ) -> "Encoding": ...

    @overload
    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool = ...,
        return_offsets_mapping: bool = ...,
        return_attention_mask: bool = ...,
        return_token_type_ids: bool = ...,
        verbose: bool = ...,
    ) -> "BatchEncoding": ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> object:
        """The conversation as one text. Raises whatever the template raises."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens with these ids."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the tokens."""

    def get_chat_template(self, *, tools: Sequence[Mapping[str, object]] | None = None) -> str:
        """The template of conversations with these tools, or without tools."""

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the tokens that were added to the vocabulary, by token."""


class Encoding(Protocol):
    """The tokens of one text."""

    @property
    def input_ids(self) -> list[int]:
        """The ids of the tokens."""

    @property
    def offset_mapping(self) -> list[tuple[int, int]]:
        """The half-open range of characters of each token, if it was asked for."""


class BatchEncoding(Protocol):
    """The tokens of several texts, a list for each text."""

    @property
    def input_ids(self) -> list[list[int]]:
        """The ids of the tokens."""

    @property
    def offset_mapping(self) -> list[list[tuple[int, int]]]:
        """The half-open range of characters of each token, if it was asked for."""


class TensorSlice(Protocol[TensorT]):
    """A tensor of a safetensors file that is not read yet."""

    def get_shape(self) -> list[int]:
        """Its shape."""

    def get_dtype(self) -> str:
        """Its type, by its name in the format."""

    def __getitem__(self, index: object) -> TensorT:
        """Read a part of it."""


class TensorFile(Protocol[TensorT]):
    """An open safetensors file: `TensorFile[torch.Tensor]` for framework "pt"."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def keys(self) -> list[str]:
        """The names of its tensors."""

    def metadata(self) -> dict[str, str] | None:
        """The texts in its header, or None without any."""

    def get_tensor(self, name: str) -> TensorT:
        """Read a tensor."""

    def get_slice(self, name: str) -> TensorSlice[TensorT]:
        """A tensor whose parts can be read."""
