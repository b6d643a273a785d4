"""The marks around the reasoning of a model, and what an answer has after it."""

# Marks of the reasoning before the answer in Qwen3, DeepSeek-R1, SmolLM3 and others.
BEGIN_OF_REASONING = "<think>"
END_OF_REASONING = "</think>"


def asks_for_reasoning(prompt: str) -> bool:
    """Whether the prompt begins reasoning, as of models that always think."""
    return prompt.rstrip().endswith(BEGIN_OF_REASONING)


def after_reasoning(answer: str, *, begun: bool) -> str | None:
    """The text after the reasoning of an answer: all of it without reasoning, None if the reasoning does not end.

    `begun`: whether the prompt has begun it.
    """
    _, ended, rest = answer.rpartition(END_OF_REASONING)
    return None if BEGIN_OF_REASONING in rest or (begun and not ended) else rest
