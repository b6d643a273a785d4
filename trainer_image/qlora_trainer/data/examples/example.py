"""An example from one row: a conversation, a completion, a preference or text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
Function = Mapping[str, object]
"""A tool's description for chat templates: JSON with `type` and `function`."""


@dataclass(frozen=True)
class ToolCall:
    """A model's request to run a function."""

    name: str
    arguments: Mapping[str, object]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    """Role tool: the function that gave this result."""
    tool_call_id: str | None = None
    reasoning: str | None = None
    """Role assistant: the reasoning before the answer, if the row has it apart."""
    trained: bool | None = None
    """Role assistant: whether the row marks the answer for training, or None where no mark counts."""


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, with at least one answer.

    An answer with tool calls is followed by their results (role tool) and another answer.
    """

    messages: tuple[Message, ...]
    tools: tuple[Function, ...] = ()

    @property
    def uses_tools(self) -> bool:
        """Whether it needs a chat template that supports tools."""
        return bool(self.tools) or any(message.tool_calls or message.role == "tool" for message in self.messages)

    @property
    def has_reasoning(self) -> bool:
        """Whether it needs a chat template that writes reasoning."""
        return any(message.reasoning is not None for message in self.messages)

    def with_system(self, text: str, *, replace: bool) -> "Conversation":
        """The conversation with this system message. `replace` overrides an existing one."""
        own = self.messages[0].role == "system"
        if own and not replace:
            return self
        return Conversation((Message("system", text), *self.messages[own:]), self.tools)


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion."""

    prompt: str
    completion: str
    separator: str = ""
    """Between the two where they are one plain text."""
    system: str | None = None

    def as_conversation(self) -> Conversation:
        """The same as a question and its answer, for a model with a chat template."""
        system = () if self.system is None else (Message("system", self.system),)
        return Conversation((*system, Message("user", self.prompt), Message("assistant", self.completion)))

    def with_system(self, text: str, *, replace: bool) -> "PromptCompletion":
        """The same with this system message. `replace` overrides an existing one."""
        if self.system is not None and not replace:
            return self
        return PromptCompletion(self.prompt, self.completion, self.separator, text)


@dataclass(frozen=True)
class PlainText:
    """Text to continue. The model is trained on all of it."""

    text: str


Example = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, one of them preferred. The prompt is in both."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion
    shared_answers: int = 0
    """How many of the first answers in the two conversations are part of the prompt."""

    def with_system(self, text: str, *, replace: bool) -> "Preference":
        """The same with this system message in both. `replace` overrides existing ones."""
        chosen, rejected = (one.with_system(text, replace=replace) for one in (self.chosen, self.rejected))
        return Preference(chosen, rejected, self.shared_answers)


@dataclass(frozen=True)
class TokenizedRow:
    """The tokens of a row, and which of them count in the loss: never the first."""

    input_ids: NDArray[numpy.int32]
    """int32 [tokens]"""
    is_target: NDArray[numpy.bool_]
    """bool [tokens]"""
    chosen_length: int | None = None
    """Of a row of format preference: how many of the tokens are the prompt with the chosen answer, which come first,
    before the prompt with the rejected one. None for any other row."""

    def __post_init__(self) -> None:
        """Raise ValueError if the two differ in length."""
        if len(self.input_ids) != len(self.is_target):
            raise ValueError(f"{len(self.input_ids)} tokens but {len(self.is_target)} target flags")
