"""Pasted programs do what they are meant to do, whatever a tenant's tokenizer contains."""

import ast
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.report.serving import tokenizer_settings


@pytest.mark.parametrize("token", [7, None], ids=["one token", "several tokens"])
def test_the_end_of_an_answer_adds_no_statement(token: int | None) -> None:
    end = EndOfTurn(text='<end>\nimport os  # "', token=token, known=(2,))
    job: Any = SimpleNamespace(prepared=SimpleNamespace(template_sha256=None, end_of_turn=end))
    program = tokenizer_settings(job, "FOLDER")
    assert '<end>\\nimport os  # \\"' in program
    assert len(ast.parse(program).body) == (token is not None)
