"""A job without a file: the manifest of the options, and errors in terms of the options."""

from typing import Any

import pytest

from qlora_api.spec.job import MAX_NAME_LENGTH, QLoRAJobDocument
from qlora_cli.cluster.job_options import _OPTIONS, OptionError, job_of
from qlora_client.jobs.names import generated_name

NONE = {option.parameter: None for option in _OPTIONS}
SMALLEST: dict[str, Any] = {**NONE, "model": "hf://org/model", "data": "hf://org/rows"}
A_VALUE: dict[type, Any] = {int: 16, float: 0.5, str: "pvc://a/b"}


def test_each_option_sets_its_field_of_the_schema() -> None:
    for option in _OPTIONS:
        names_something = option.metavar != "ADDRESS" and option.kind is str
        value = "word" if names_something else A_VALUE[option.kind]
        value = "24Gi" if option.metavar == "MEMORY" else value
        needed = {"destination": "hf://org/adapter"} if option.name == "--destination-secret" else {}
        body = job_of("job", {**SMALLEST, **needed, option.parameter: value}, "")
        field = body["spec"]
        for part in option.field.split("."):
            field = field[part]
        assert field == value
        QLoRAJobDocument.model_validate(body, by_alias=True, by_name=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**NONE, "data": "hf://org/rows"}, "missing --model: name them, or the FILE of a whole job"),
        ({**SMALLEST, "rank": 0}, "--rank: found 0, must be greater than or equal to 1"),
        ({**SMALLEST, "model": "org/model"}, "--model: found 'org/model': did you mean hf://org/model? It must be hf:"),
        ({**SMALLEST, "epochs": 1, "max_steps": 4}, "spec.training: "),
    ],
)
def test_a_rejection_by_the_schema_names_the_option(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as rejected:
        job_of("job", values, "")
    assert str(rejected.value).startswith(words)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://meta-llama/Llama-3.1-8B_Instruct", "llama-3-1-8b-instruct-abc123"),
        ("pvc://models/base/", "base-abc123"),
        ("oci://registry/…", "job-abc123"),
        ("hf://org/" + "x" * 90, "x" * (MAX_NAME_LENGTH - 7) + "-abc123"),
    ],
)
def test_a_name_is_made_of_the_models(model: str, name: str) -> None:
    assert generated_name(model, "abc123") == name
    assert len(name) <= MAX_NAME_LENGTH
