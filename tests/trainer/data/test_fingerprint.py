"""Runs are the same if they give the same adapter; differences are named."""

from typing import Any

import pytest

from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.data.fingerprint import ResolvedInputs
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, differences, run_fingerprint
from tests.support.manifests import merged
from tests.support.resolved import resolved_spec

INPUTS = ResolvedInputs("commit", {"tokenizer.json": "a" * 64}, ("b" * 64,), None)
STORED: dict[str, Any] = {"source": "s3://bucket/rows.jsonl", "secretRef": {"name": "reader"}}
REPOSITORY: dict[str, Any] = {"source": "hf://org/rows"}


def fingerprint(changes: dict[str, Any] | None = None, inputs: ResolvedInputs = INPUTS) -> Fingerprint:
    """Of a job that prepare has found these inputs for."""
    default = {"model": {"source": "hf://org/model"}, "dataset": {"source": "pvc://data/rows.jsonl"}}
    spec = resolved_spec(QLoRAJobSpec.model_validate(merged(default, changes or {})))
    record = PrepareRecord(
        fingerprint=inputs.fingerprint(spec),
        model_path="model",
        model_revision=inputs.model,
        base_path="base",
        base_sha256="c" * 64,
        data_path="data/rows",
        data_content=inputs.content(spec.dataset),
        target_modules=("q_proj",),
        packed=True,
        model_type="llama",
        memory=MemoryStatus(estimate_bytes=1, low_bytes=1, high_bytes=1, verdict="unknown"),
        dataset=DatasetStatus(format="text", rows=1, used_rows=1),
    )
    read_back = PrepareRecord.model_validate_json(record.model_dump_json(by_alias=True))
    return run_fingerprint(spec, read_back, "cpu", 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"model": {"revision": "0" * 40}}),
        ({}, {"dataset": STORED}),
        ({"dataset": STORED}, {"dataset": STORED | {"secretRef": {"name": "renamed"}}}),
        ({"dataset": REPOSITORY}, {"dataset": REPOSITORY | {"revision": "0" * 40}}),
        ({}, {"dataset": {"sha256": "b" * 64, "deduplicate": False}}),
        ({"dataset": {"chatTemplate": "configMap://a/b"}}, {"dataset": {"chatTemplate": "configMap://c/d"}}),
        (
            {"dataset": {"eval": {"source": "pvc://data/a.jsonl"}}},
            {"dataset": {"eval": {"source": "pvc://data/b.jsonl", "overlap": "report"}}},
        ),
        ({"training": {"objective": "dpo"}}, {"training": {"objective": "dpo", "preference": {}}}),
        # As Go writes a 1.0.
        ({"training": {"weightDecay": 1.0}}, {"training": {"weightDecay": 1}}),
        ({"training": {"objective": "dpo"}}, {"training": {"objective": "dpo", "preference": {"beta": 0.1}}}),
    ],
)
def test_settings_that_do_not_affect_training_keep_the_fingerprint(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert differences(fingerprint(one), fingerprint(other)) == ""


MIX: dict[str, Any] = {"source": None, "mix": [{"source": "pvc://data/a.jsonl"}, {"source": "pvc://data/b.jsonl"}]}


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({}, {"dataset": {"maxRows": 5}}, "dataset.maxRows was not set, is 5"),
        ({}, {"dataset": {"format": "text"}}, 'dataset.format was "auto", is "text"'),
        ({}, {"dataset": {"eval": {"fraction": 0.1}}}, "dataset.eval.fraction was not set, is 0.1"),
        (
            {"dataset": MIX},
            {"dataset": MIX | {"mix": [MIX["mix"][0], MIX["mix"][1] | {"format": "text"}]}},
            'dataset.mix.1.format was "auto", is "text"',
        ),
        (
            {"training": {"objective": "dpo"}},
            {"training": {"objective": "dpo", "preference": {"beta": 0.2}}},
            "training.preference.beta was not set, is 0.2",
        ),
    ],
)
def test_a_setting_that_differs_is_named(one: dict[str, Any], other: dict[str, Any], named: str) -> None:
    assert differences(fingerprint(one), fingerprint(other)).startswith(named)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (ResolvedInputs("commit", INPUTS.tokenizer, ("d" * 64,), None), "the rows of dataset.source or mix changed"),
        (ResolvedInputs("commit", INPUTS.tokenizer, INPUTS.data, "d" * 64), "the rows of dataset.eval.source changed"),
        (
            ResolvedInputs("commit", INPUTS.tokenizer, INPUTS.data, None, "d" * 64),
            "the template of dataset.chatTempl",
        ),
        (ResolvedInputs("commit", {"tokenizer.json": "d"}, INPUTS.data, None), "the model's tokenizer.json changed"),
        (ResolvedInputs("another", INPUTS.tokenizer, INPUTS.data, None), 'model.revision was "commit", is "another"'),
    ],
)
def test_content_that_differs_is_named(inputs: ResolvedInputs, named: str) -> None:
    assert named in differences(fingerprint(), fingerprint(inputs=inputs))
