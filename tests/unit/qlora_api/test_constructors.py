"""A program that constructs a spec: the words for a wrong setting, and for a change of a frozen one."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.schema import ApiModel, replace, replace_known
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.training import LoraSpec, TrainingSpec

MODEL = {"model": {"source": "hf://org/model"}}
ROWS = {"dataset": {"source": "hf://org/rows"}}


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (TrainingSpec, {"learnig_rate": 1e-4}, "learnig_rate\n  unknown field; did you mean learning_rate?"),
        (QLoRAJobSpec, {**MODEL, **ROWS, "learning_rate": 1}, "unknown field; it is training.learning_rate"),
        (TrainingSpec, {"learning_rate": 2}, "learning_rate\n  found 2, must be less than or equal to 1"),
        (QLoRAJobSpec, {**MODEL, **ROWS, "training": {"learningRate": 2}}, "found 2, must be less than or equal to 1"),
        (LoraSpec, {"rank": "many"}, 'rank\n  found "many", must be a whole number'),
        (LoraSpec, {"target_modules": "q_proj"}, 'target_modules\n  found "q_proj", must be a list'),
        (QLoRAJobSpec, {**MODEL, "dataset": LoraSpec()}, "dataset\n  found a LoraSpec, must be a DatasetSpec"),
        (QLoRAJobSpec, {**ROWS, "model": {"source": "org/model"}}, "did you mean hf://org/model?"),
        (TrainingSpec, {"epochs": 1, "max_steps": 2}, "\n  set only one of epochs and maxSteps"),
    ],
)
def test_a_wrong_setting_has_the_sentence_of_a_manifest_and_its_name_in_python(
    model: type[ApiModel], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as rejected:
        model(**values)
    assert message in str(rejected.value)
    assert rejected.value.error_count() == 1
    assert "pydantic.dev" not in str(rejected.value)


def test_a_change_of_a_spec_names_the_way_to_a_copy() -> None:
    spec = TrainingSpec()
    with pytest.raises(AttributeError, match=r"a TrainingSpec is frozen: replace\(…, learning_rate=…\) of qlora_api"):
        spec.learning_rate = 1e-4  # type: ignore[misc]
    assert replace(spec, learning_rate=1e-4).learning_rate == 1e-4


def test_a_copy_may_have_another_model() -> None:
    spec = QLoRAJobSpec.model_validate({**MODEL, **ROWS})
    other = BaseModelSpec(source="hf://org/other")
    assert replace(spec, model=other).model == replace_known(spec, model=other).model == other
