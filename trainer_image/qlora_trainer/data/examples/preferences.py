"""Reads prompts with two answers: texts, message lists, or two conversations."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.examples.conversations import CHAT, SHAREGPT, check_turns, checked_text, read_turns
from qlora_trainer.data.examples.example import Conversation, Function, Message, Preference, PromptCompletion
from qlora_trainer.data.read.rows import describe

_KINDS = "must be text, or a list of {role, content}"


@dataclass(frozen=True)
class PreferenceColumns:
    """The values of a preference row, with the column names for messages."""

    location: str
    prompt: object
    """None where chosen and rejected have it."""
    chosen: object
    rejected: object
    prompt_name: str
    chosen_name: str
    rejected_name: str
    columnar: bool
    field: str
    """The job's field that has the names of columns."""

    def read(self, tools: tuple[Function, ...]) -> Preference:
        """The row's example. Raises StepFailure BAD_DATASET naming location and column."""
        if isinstance(self.chosen, str) and isinstance(self.rejected, str):
            return self._of_texts()
        chosen, rejected = self._turns(self.chosen, self.chosen_name), self._turns(self.rejected, self.rejected_name)
        prompt = self._prompt_turns(chosen)
        if prompt:
            chosen, rejected = _continue(prompt, chosen), _continue(prompt, rejected)
        return self._of_conversations(chosen, rejected, tools)

    def _of_texts(self) -> Preference:
        if self.prompt is None:
            raise bad_dataset(
                f"{self.location} has no {self.prompt_name!r}: {self.chosen_name!r} and {self.rejected_name!r} are "
                f"texts, which need one; name it in {self.field}.columns.prompt, or write whole conversations as lists "
                "of {role, content}"
            )
        prompt = checked_text(self.prompt, self._where(self.prompt_name))
        chosen, rejected = (
            PromptCompletion(prompt, checked_text(value, self._where(name)))
            for value, name in ((self.chosen, self.chosen_name), (self.rejected, self.rejected_name))
        )
        return Preference(chosen, rejected)

    def _prompt_turns(self, chosen: Sequence[Message]) -> tuple[Message, ...]:
        """The messages of the prompt, or none where the answers include them."""
        if self.prompt is None:
            return ()
        if isinstance(self.prompt, str):
            # As in UltraFeedback, whose conversations begin with the text of the column.
            whole = chosen[0].role in ("system", "user")
            return () if whole else (Message("user", checked_text(self.prompt, self._where(self.prompt_name))),)
        return self._turns(self.prompt, self.prompt_name)

    def _of_conversations(
        self, chosen: tuple[Message, ...], rejected: tuple[Message, ...], tools: tuple[Function, ...]
    ) -> Preference:
        for messages, name in ((chosen, self.chosen_name), (rejected, self.rejected_name)):
            check_turns(messages, self.location, name)
            if messages[-1].role != "assistant" or messages[-1].tool_calls:
                raise bad_dataset(
                    f"{self._where(name)} ends with a message of role {messages[-1].role!r}"
                    f"{' that calls a tool' if messages[-1].tool_calls else ''}: must end with an answer in words"
                )
        shared = _shared_messages(chosen, rejected)
        if not any(message.role == "user" for message in shared):
            raise bad_dataset(
                f"{self.location}: {self.chosen_name!r} and {self.rejected_name!r} do not begin with the same prompt: "
                f"both must be answers to one prompt; name its column in {self.field}.columns.prompt if there is one"
            )
        answers = sum(message.role == "assistant" for message in shared)
        return Preference(Conversation(chosen, tools), Conversation(rejected, tools), answers)

    def _turns(self, value: object, name: str) -> tuple[Message, ...]:
        if not isinstance(value, list):
            raise bad_dataset(
                f"{self._where(name)} is {describe(value)}: {_KINDS}; {self.chosen_name!r} and {self.rejected_name!r} "
                "must be of the same kind"
            )
        first = value[0] if value else None
        notation = SHAREGPT if isinstance(first, dict) and SHAREGPT.role in first else CHAT
        return read_turns(value, notation, self.location, name, columnar=self.columnar)

    def _where(self, name: str) -> str:
        return f"{self.location}: {name!r}"


def _continue(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt with its answer, which may begin with the prompt already."""
    return answer if answer[: len(prompt)] == prompt else (*prompt, *answer)


def _shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages that both begin with: the prompt. Excludes the last answers."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    return chosen[:count]
