"""Finds the model's answer in a rendered conversation, and the end of its reasoning."""

from bisect import bisect_left

# Marks of the reasoning before the answer in Qwen3, DeepSeek-R1, SmolLM3 and others.
BEGIN_OF_REASONING = "<think>"
END_OF_REASONING = "</think>"


def answer_span(text: str, prompt: str, through: str, answer: str) -> tuple[int, int] | None:
    """The characters [start, end) of the model's answer in a rendered conversation, its end mark included.

    `text` is the whole conversation, `prompt` the part before the answer with the generation prompt, `through` the
    part up to and including the answer, each rendered separately. None if they do not fit together.

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
    kept = _longest_overlap(turn, text[len(prompt) : len(prompt) + len(turn)], len(turn) - turn.rfind(ending))
    if not kept:
        return None
    marked = turn[len(turn) - kept :].rstrip()
    return len(prompt), len(prompt) + (kept if marked.endswith(ending) else len(marked))


def _longest_overlap(ending: str, beginning: str, shortest: int) -> int:
    """The length of the longest end of `ending` that `beginning` begins with.

    It is at least `shortest`, or 0. Takes time in proportion to the characters, whatever these are (Knuth, Morris,
    Pratt): a row may be made to have many ends that differ from the beginning late.
    """
    # Most reasoning has nothing of what follows it, so this leaves the short rest to look at.
    start = ending.find(beginning[:shortest])
    if start < 0 or len(beginning) < shortest:
        return 0
    if beginning.startswith(ending[start:]):
        return len(ending) - start
    shorter = _overlaps_with_itself(beginning)
    matched = 0
    for character in ending[start:]:
        while matched and (matched == len(beginning) or beginning[matched] != character):
            matched = shorter[matched - 1]
        if matched < len(beginning) and beginning[matched] == character:
            matched += 1
    return matched if matched >= shortest else 0


def _overlaps_with_itself(text: str) -> list[int]:
    """For each beginning, the length of its longest proper end that begins the text."""
    overlaps, matched = [0], 0
    for character in text[1:]:
        while matched and text[matched] != character:
            matched = overlaps[matched - 1]
        matched += text[matched] == character
        overlaps.append(matched)
    return overlaps


def asks_for_reasoning(prompt: str) -> bool:
    """Whether the prompt begins reasoning, as of models that always think."""
    return prompt.rstrip().endswith(BEGIN_OF_REASONING)


def after_reasoning(answer: str, *, begun: bool) -> str | None:
    """The text after the reasoning, which the prompt may have begun. None if unended."""
    _, ended, rest = answer.rpartition(END_OF_REASONING)
    return None if BEGIN_OF_REASONING in rest or (begun and not ended) else rest
