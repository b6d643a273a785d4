"""Pasted programs do what they are meant to do, whatever a tenant's tokenizer contains."""

import ast
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.report.serving import peft_program
from tests.support.manifests import MINIMAL


@pytest.mark.parametrize("token", [7, None], ids=["one token", "several tokens"])
def test_the_end_of_an_answer_adds_no_statement(token: int | None) -> None:
    end = EndOfTurn(text='<end>\nimport os  # "', token=token, known=(2,))
    programs = [peft_program(job_with(end), "FOLDER") for end in (None, end)]
    assert '<end>\\nimport os  # \\"' in programs[1]
    plain, with_end = (len(ast.parse(program).body) for program in programs)
    assert with_end - plain == (token is not None)


def job_with(end: EndOfTurn | None) -> Any:
    """A trained job whose answers end so."""
    prepared = SimpleNamespace(
        auto_class="AutoModelForCausalLM",
        model_revision="c0ffee",
        experts_in_mxfp4=False,
        end_of_turn=end,
        dataset=SimpleNamespace(format="chat"),
    )
    spec = QLoRAJobSpec.model_validate(MINIMAL["spec"])
    return SimpleNamespace(prepared=prepared, spec=spec, has_chat_template=True)


def test_the_program_asks_as_the_rows_were_written() -> None:
    job = job_with(None)
    asked = {}
    for name, has_template, form in (("chat", True, "chat"), ("no template", False, "chat"), ("text", True, "text")):
        job.has_chat_template, job.prepared.dataset.format = has_template, form
        asked[name] = "apply_chat_template" in peft_program(job, "FOLDER")
    assert asked == {"chat": True, "no template": False, "text": False}
    end = EndOfTurn(text="<end>", token=None, known=(2,))
    assert 'stop_strings=["<end>"], tokenizer=tokenizer)' in peft_program(job_with(end), "FOLDER")
