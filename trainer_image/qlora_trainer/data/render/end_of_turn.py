"""Finds the end-of-turn mark and template marks that are not single tokens."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import Conversation, Message
from qlora_trainer.data.render.chat_template import Rendered, Tokenizer

# A word that no template writes by itself.
_ANSWER = "probeanswer"
_PROBE = Conversation((Message("user", "question"), Message("assistant", _ANSWER)))
# <|im_start|>, <start_of_turn>, [INST]: what templates put between the turns.
_MARK = re.compile(r"</?\|?[A-Za-z0-9_]+\|?>|\[/?[A-Z_]+\]")
_LISTED_MARKS = 6


def end_of_turn(tokenizer: Tokenizer, folder: Path) -> EndOfTurn | None:
    """The end of an answer, if a server of the model in `folder` does not stop there by default, or None.

    Its text is empty if the template writes nothing there. Also None if the template rejects a question and answer.
    """
    rendered = _render(tokenizer)
    if rendered is None:
        return None
    text, (_, end) = rendered.text, rendered.targets[0]
    start = text.index(_ANSWER) + len(_ANSWER)
    ids = tokenizer.tokens_of(text, start, end)
    known = _stops(folder) | {tokenizer.end_id}
    if ids and ids[0] in known:
        return None
    mark = text[start:end].strip()
    # White space alone is no mark: answers have the same inside them, and a server would stop at the first of it.
    return EndOfTurn(text=mark, token=ids[0] if mark and len(ids) == 1 else None, known=tuple(sorted(known)))


def _render(tokenizer: Tokenizer) -> Rendered | None:
    try:
        return tokenizer.render(_PROBE, "a question and its answer")
    except StepFailure:
        return None


def _stops(folder: Path) -> set[int]:
    """The tokens where a server stops, by the model's generation_config.json."""
    try:
        found = json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)}


def marks_in_pieces(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The template's marks that become several tokens, in the order of the text."""
    rendered = _render(tokenizer)
    if rendered is None:
        return ()
    marks = dict.fromkeys(_MARK.findall(rendered.text))
    return tuple(mark for mark in marks if len(tokenizer.tokens_of(mark, 0, len(mark))) > 1)


def template_remarks(end: EndOfTurn | None, pieces: Collection[str]) -> tuple[str, ...]:
    """Remarks for the user on the end of answers and marks of several tokens."""
    remarks = []
    if pieces:
        listed = ", ".join(list(pieces)[:_LISTED_MARKS])
        remarks.append(
            f"the tokenizer has no token for {listed}, so each is several tokens, which the adapter learns as text; "
            "the model's embeddings stay as they are"
        )
    if end is not None and not end.text:
        remarks.append("the chat template writes nothing after an answer, so the model does not learn where to stop")
    elif end is not None:
        remarks.append(
            f"answers end with {end.text!r}, servers do not stop at this text by default: send "
            f"{end.request_field} with each request"
        )
    return tuple(remarks)
