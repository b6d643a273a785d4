"""Place of an answer in a rendered conversation, also without its reasoning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data.render.answer_span import answer_span
from tests.fuzz.inputs import BOUNDED


@pytest.mark.parametrize(
    ("text", "prompt", "through", "expected"),
    [
        ("Q: a\nA: b\n", "Q: a\nA: ", "Q: a\nA: b\n", "b\n"),  # a line's end is the only end mark
        ("Q: a\nA: b</s>\nQ", "Q: a\nA: ", "Q: a\nA: b</s>\n", "b</s>"),
        ("Q: a\nA: b</s>", "Q: x\nA: ", "Q: a\nA: b</s>", None),
        ("Q: a\nA: </s>Q", "Q: a\nA: ", "Q: a\nA: b</s>", None),  # the answer itself is dropped
    ],
)
def test_the_span_of_an_answer(text: str, prompt: str, through: str, expected: str | None) -> None:
    span = answer_span(text, prompt, through, "b")
    assert (None if span is None else text[slice(*span)]) == expected


def test_reasoning_that_repeats_the_answer_is_left_out_whole() -> None:
    """Each repetition begins like the answer and what follows, but ends differently."""
    repeated = "a</s>\n" * 20_000
    prompt, text = "Q: a\nA: ", "Q: a\nA: a</s>\n" + repeated + "Q"
    assert answer_span(text, prompt, prompt + repeated + "b</think>a</s>\n", "a") == (len(prompt), len(prompt) + 5)


@settings(BOUNDED, max_examples=500)
@given(data=st.data())
def test_the_longest_end_of_a_turn_that_the_text_has_is_the_answer(data: st.DataObject) -> None:
    """With texts of three letters, whose ends and beginnings overlap in many ways."""
    reasoning, answer = data.draw(st.text("ab|", max_size=8)), data.draw(st.text("ab", min_size=1, max_size=4))
    kept = data.draw(st.sampled_from([reasoning[start:] for start in range(len(reasoning) + 1)]))
    turn = f"{reasoning}{answer}|"
    rest = data.draw(st.text("ab|", max_size=12) | st.text("ab", max_size=8).map((kept + answer + "|").__add__))

    span = answer_span(f"Q:{rest}", "Q:", f"Q:{turn}", answer)

    ends = (turn[start:] for start in range(turn.rfind(answer) + 1))
    longest = next((end for end in ends if rest.startswith(end)), None)
    assert span == (None if longest is None else (2, 2 + len(longest)))
