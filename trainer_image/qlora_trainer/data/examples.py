"""What a model is trained on in one row: a conversation, a prompt with its completion, or plain text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Function = Mapping[str, object]
"""A tool's description, as the model's chat template takes it: a JSON schema with `type` and `function`."""


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


@dataclass(frozen=True)
class PlainText:
    """Text to continue; the model is trained on all of it."""

    text: str


Example = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, of which one is preferred. The prompt is in both."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion
    shared_answers: int = 0
    """How many of the first answers in the two conversations are part of the prompt."""
