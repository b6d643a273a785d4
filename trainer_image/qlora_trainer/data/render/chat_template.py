"""Renders examples with the model's chat template, tokenizes them, and marks the tokens that are targets.

An example is rendered as one text, with the offsets of the spans to train on. The text is tokenized as a
whole, and a token is a target if any of its characters is in such a span: the first token of an answer may begin with
the space that ends the prompt. Token ids decide nothing: the padding id is often that of the end of text.

Features of a template (tools, reasoning, parts of a message) are found by rendering words that no template writes. A
template may ignore a key without an error, or rewrite a value, so neither its text nor rendered rows show them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy

from qlora_api.printable import first_line
from qlora_api.spec.training import TrainOn
from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset
from qlora_trainer.core.protocols import FastTokenizer
from qlora_trainer.data.examples.example import (
    Conversation,
    Example,
    PlainText,
    Preference,
    PromptCompletion,
    TokenizedRow,
)
from qlora_trainer.data.render.answer_span import answer_span
from qlora_trainer.data.render.messages import (
    CLOSING_PROBE,
    CONTENT_PROBE,
    REASONING_KEYS,
    REASONING_PROBE,
    SYSTEM_PROBE,
    TOOL_PROBE,
    TOOL_PROBE_PARTS,
    template_message,
)
from qlora_trainer.data.render.safe_template import (
    TEMPLATE_ERRORS,
    LimitExceeded,
    UnusableText,
    freeze_template,
    limited_time,
    usable,
)
from qlora_trainer.data.render.template_source import JobTemplate, processor_template

# Each answer takes two more renderings. For up to so many answers, tokenizing the row before them would save nothing.
_FEW_ANSWERS = 8


@dataclass(frozen=True)
class Rendered:
    """The text of an example, and the half-open character spans to train on."""

    text: str
    targets: tuple[tuple[int, int], ...]
    """The spans of every answer but those that the row excludes, or of all of a plain text.

    Empty if they were not searched for in a row that is too long.
    """
    has_marks: bool
    """Whether the text has begin and end marks, as that of a chat template does."""

    def trained_spans(self, train_on: TrainOn) -> tuple[tuple[int, int], ...]:
        """The spans of characters that are trained on."""
        if train_on == "all":
            return ((0, len(self.text)),)
        return self.targets[-1:] if train_on == "last" else self.targets


class Tokenizer:
    """A model's tokenizer and chat template, or the job's template in place of that."""

    def __init__(self, folder: Path, template: JobTemplate | None = None) -> None:
        """Load without running model code. Raises StepFailure BAD_CONFIGURATION."""
        from transformers import AutoTokenizer

        self.folder, self.template = folder, template
        try:
            self._tokenizer = cast(
                "FastTokenizer",
                AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError) as error:
            raise bad_configuration(f"the model's tokenizer cannot be loaded: {first_line(error)}") from error
        if not self._tokenizer.is_fast:
            raise bad_configuration(
                "the model's tokenizer reports no offsets: use a model with tokenizer.json (a fast tokenizer)"
            )
        end = self._tokenizer.eos_token_id
        if end is None:
            raise bad_configuration("the model's tokenizer has no end-of-text token (eos_token): use another model")
        self.end_id: int = end
        begin = self._tokenizer.bos_token_id
        first = self._tokenizer("a").input_ids[:1]
        self._begin: list[int] = first if first == [begin] else []
        if template is not None:
            self._tokenizer.chat_template = template.for_tokenizer(begins=bool(self._begin))
        elif not self._tokenizer.chat_template:
            self._tokenizer.chat_template = processor_template(folder)
        self.has_chat_template = bool(self._tokenizer.chat_template)
        if self.has_chat_template:
            freeze_template(self._tokenizer, self._whose)

    @property
    def template_text(self) -> str | None:
        """The job's chat template, as it is for this tokenizer, or None."""
        return None if self.template is None else self.template.for_tokenizer(begins=bool(self._begin))

    def tokens_of(self, text: str, start: int, end: int) -> list[int]:
        """The ids of the tokens that overlap the characters [start, end) of a text."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        return [token for token, (first, past) in pairs if first < end and start < past]

    def pieces(self, rendered: Rendered) -> Iterator[str]:
        """The text of each token that `tokenize` makes: together all of the text."""
        if not rendered.has_marks:
            yield from self._tokenizer.convert_ids_to_tokens(self._begin)
        encoded = self._tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        done, ends = 0, [past for _, past in encoded.offset_mapping]
        for position, past in enumerate(ends, start=1):
            # Offsets leave out blanks before a word that belong to its token, and those at the end.
            until = len(rendered.text) if position == len(ends) else max(past, done)
            yield rendered.text[done:until]
            done = until
        if not rendered.has_marks:
            yield self._tokenizer.eos_token

    @property
    def _whose(self) -> str:
        return (
            "the model's chat template" if self.template is None else "the chat template of spec.dataset.chatTemplate"
        )

    def render(self, example: Example, location: str, longest_allowed: int | None = None) -> Rendered:
        """The example as text. With a chat template, a prompt and its completion become a user's and a model's turn.

        Answers are not searched for if many are longer than `longest_allowed` tokens together. Raises StepFailure
        BAD_DATASET, beginning with `location`, for a missing template or one that rejects the conversation.
        """
        if isinstance(example, PlainText):
            return Rendered(example.text, ((0, len(example.text)),), has_marks=False)
        if isinstance(example, PromptCompletion) and not self.has_chat_template:
            system = f"{example.system}\n\n" if example.system else ""
            prompt = system + example.prompt + example.separator
            text = prompt + example.completion
            return Rendered(text, ((len(prompt), len(text)),), has_marks=False)
        if not self.has_chat_template:
            raise bad_dataset(
                f"{location}: the data set is of format chat, but the model has no chat template: name one in "
                "spec.dataset.chatTemplate, such as chatml, or use an instruct model, or a data set of format "
                "prompt-completion or text"
            )
        conversation = example.as_conversation() if isinstance(example, PromptCompletion) else example
        return self._render_conversation(conversation, location, longest_allowed)

    def render_pair(
        self, pair: Preference, location: str, longest_allowed: int | None = None
    ) -> tuple[Rendered, Rendered]:
        """The prompt with each answer, as `render`. Only the answers are trained on."""
        chosen, rejected = (self.render(one, location, longest_allowed) for one in (pair.chosen, pair.rejected))
        first = pair.shared_answers
        return replace(chosen, targets=chosen.targets[first:]), replace(rejected, targets=rejected.targets[first:])

    def _render_conversation(self, conversation: Conversation, location: str, longest_allowed: int | None) -> Rendered:
        if conversation.uses_tools and not self._takes_tools:
            raise bad_dataset(
                f"{location}: the conversation uses tools, but {self._whose} leaves out tools, calls or "
                "their results: use a model that supports tools, or leave such rows out"
            )
        if conversation.has_reasoning and self._reasoning_key is None:
            raise bad_dataset(
                f"{location}: an answer has reasoning, but {self._whose} leaves it out: use a model that thinks, write "
                "the reasoning into the content (<think>…</think>), or remove it from the rows"
            )
        messages = conversation.messages
        text = self._apply_template(conversation, len(messages), location)
        answers = sum(message.role == "assistant" for message in messages)
        if longest_allowed is not None and answers > _FEW_ANSWERS:
            encoded = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
            if len(encoded.input_ids) > longest_allowed:
                return Rendered(text, (), has_marks=True)
        spans = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._apply_template(conversation, index, location, add_generation_prompt=True)
                last = index + 1 == len(messages)
                through = text if last else self._apply_template(conversation, index + 1, location)
                through = through.removesuffix(self._closing)
                answer = message.content if message.content.strip() else message.tool_calls[0].name
                span = answer_span(text, prompt, through, answer)
                if span is None:
                    raise bad_dataset(
                        f"{location}: in the text that {self._whose} makes, message {index} of the "
                        "conversation cannot be separated from the rest: use a model whose template keeps every "
                        "answer as it is, or rows with one answer"
                    )
                if message.trained is not False:
                    spans.append(span)
        return Rendered(text, tuple(spans), has_marks=True)

    @cached_property
    def _reasoning_key(self) -> str | None:
        """The template's key for a message's reasoning, or None if it leaves it out."""
        reasoning = REASONING_PROBE.messages[1].reasoning or ""
        return next((key for key in REASONING_KEYS if self._writes(reasoning, REASONING_PROBE, key=key)), None)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template takes a message's content as a list of parts only."""
        content = CONTENT_PROBE.messages[0].content
        takes_text = self._writes(content, CONTENT_PROBE, in_parts=False)
        return not takes_text and self._writes(content, CONTENT_PROBE, in_parts=True)

    def _writes(self, word: str, probe: Conversation, *, in_parts: bool | None = None, key: str | None = None) -> bool:
        """Whether the probe's text has the word, or is unusable (the first row reports)."""
        parts = self._takes_parts if in_parts is None else in_parts
        try:
            text = self._text(
                probe, len(probe.messages), add_generation_prompt=False, in_parts=parts, reasoning_key=key
            )
        except UnusableText:
            return True
        except (*TEMPLATE_ERRORS, MemoryError):
            return False
        return word in text

    def require_system_message(self) -> None:
        """Raise StepFailure BAD_CONFIGURATION unless system messages have a place."""
        if not self.has_chat_template:
            return
        try:
            text, why = self._apply_template(SYSTEM_PROBE, 3, "a conversation with a system message"), ""
        except StepFailure as failure:
            if not self._takes_conversations:
                return  # the first row reports the template's error
            text, why = "", f" ({failure.message})"
        if SYSTEM_PROBE.messages[0].content not in text:
            raise bad_configuration(
                f"spec.dataset.systemPrompt is set, but {self._whose} takes no system message{why}: remove it, write "
                "the text into the rows' questions, or name another template in spec.dataset.chatTemplate"
            )

    @property
    def _takes_conversations(self) -> bool:
        """Whether the template renders a conversation that has nothing special."""
        try:
            self._apply_template(Conversation(SYSTEM_PROBE.messages[1:]), 2, "a conversation")
        except StepFailure:
            return False
        return True

    @cached_property
    def _takes_tools(self) -> bool:
        """Whether the rendered text has all parts of a conversation with tools."""
        try:
            text = self._apply_template(TOOL_PROBE, len(TOOL_PROBE.messages), "a conversation with tools")
        except StepFailure as failure:
            # Then the first row reports the template's error.
            return isinstance(failure.__cause__, UnusableText)
        return all(part in text for part in TOOL_PROBE_PARTS)

    @cached_property
    def _closing(self) -> str:
        """The mark after a whole conversation, outside its last turn (as Phi's)."""
        try:
            closed, asking = (
                self._apply_template(CLOSING_PROBE, 1, "a question", add_generation_prompt=asked)
                for asked in (False, True)
            )
        except StepFailure:
            return ""
        if asking.startswith(closed):
            return ""
        marks = (mark for mark in self._tokenizer.get_added_vocab() if closed.endswith(mark))
        return next((mark for mark in marks if asking.startswith(closed.removesuffix(mark))), "")

    def _apply_template(
        self, conversation: Conversation, count: int, location: str, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of the first `count` messages."""
        try:
            return self._text(
                conversation,
                count,
                add_generation_prompt=add_generation_prompt,
                in_parts=self._takes_parts,
                reasoning_key=self._reasoning_key if conversation.has_reasoning else None,
            )
        except LimitExceeded as error:
            raise bad_dataset(f"{location}: {self._whose} {error} for this conversation: use another") from error
        except UnusableText as error:
            raise bad_dataset(f"{location}: {self._whose} {error}") from error
        except TEMPLATE_ERRORS as error:
            raise bad_dataset(f"{location}: {self._whose} rejects this conversation: {first_line(error)}") from error
        except MemoryError as error:
            raise bad_dataset(
                f"{location}: {self._whose} needs more memory than there is: use another model"
            ) from error

    def _text(
        self,
        conversation: Conversation,
        count: int,
        *,
        add_generation_prompt: bool,
        in_parts: bool,
        reasoning_key: str | None = None,
    ) -> str:
        """Render the first `count` messages. Raises as the template does."""
        turns = [
            template_message(message, in_parts=in_parts, reasoning_key=reasoning_key)
            for message in conversation.messages[:count]
        ]
        tools = [dict(tool) for tool in conversation.tools] or None
        with limited_time():
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        return usable(str(text), (turns, tools, self._tokenizer.chat_template))

    def tokenize(self, batch: Sequence[Rendered], train_on: TrainOn) -> Iterator[TokenizedRow]:
        """The tokens of rendered examples. A plain text's end is a target too."""
        encoded = self._tokenizer(
            [rendered.text for rendered in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for rendered, ids, offsets in zip(batch, encoded.input_ids, encoded.offset_mapping, strict=True):
            first, past = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2).T
            is_target = numpy.zeros(len(ids), dtype=numpy.bool_)
            for start, end in rendered.trained_spans(train_on):
                is_target |= (first < end) & (start < past)
            if not rendered.has_marks:
                ids = [*self._begin, *ids, self.end_id]
                is_target = numpy.concatenate([numpy.zeros(len(self._begin), numpy.bool_), is_target, [True]])
            is_target[:1] = False
            yield TokenizedRow(numpy.array(ids, dtype=numpy.int32), is_target)
