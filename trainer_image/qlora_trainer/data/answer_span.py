"""Finds the model's answer in a rendered conversation, by what the chat template makes of its parts."""

from bisect import bisect_left

from qlora_trainer.core.reasoning import BEGIN_OF_REASONING, END_OF_REASONING


def answer_span(text: str, prompt: str, through: str, answer: str) -> tuple[int, int] | None:
    """The characters [start, end) of the model's answer in a rendered conversation, its end mark included.

    `text` is the whole conversation, `prompt` the part before the answer with the generation prompt, `through` the
    part up to and including the answer, each rendered on its own. None if they do not fit together.

    Some templates leave the reasoning out of all answers but the last one. `text` then has only the end of what follows
    the prompt in `through`: the longest such end is taken, and it must have as much of the end of the answer as
    `through` does, or all that follows its reasoning. Whitespace after the end mark is not part of the answer: a model
    stops before it.

    Some templates begin an answer that is asked for with the mark of reasoning, and not one that is given and has none.
    """
    if not text.startswith(prompt):
        prompt = prompt.rstrip().removesuffix(BEGIN_OF_REASONING)
    if not (text.startswith(prompt) and through.startswith(prompt)):
        return None
    turn, answer = through[len(prompt) :], answer.strip()
    answer = answer.rpartition(END_OF_REASONING)[2].strip() or answer
    # A longer end of the answer is in the turn only if all shorter ones are.
    kept_from = bisect_left(range(len(answer)), True, key=lambda start: answer[start:] in turn)
    ending = answer[kept_from:]
    if not ending:
        return None
    for skipped in range(turn.rfind(ending) + 1):
        kept = turn[skipped:]
        if text.startswith(kept, len(prompt)):
            marked = kept.rstrip()
            return len(prompt), len(prompt) + len(kept if marked.endswith(ending) else marked)
    return None
