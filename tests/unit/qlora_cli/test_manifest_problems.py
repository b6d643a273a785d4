"""The answer to a wrong field of a manifest: the words of the manifest, and a valid value."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_api.problems import WORDS_OF_PATTERN
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.manifest import ManifestError, load_manifest
from tests.support.manifests import with_value, without
from tests.support.rejected.inputs import FIELDS

JOB: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1beta1",
    "kind": "QLoRAJob",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"source": "pvc://models/model"},
        "dataset": {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0.1}},
        "training": {"maxSteps": 3, "evalEverySteps": 1},
    },
}
SWEEP: dict[str, Any] = {
    **JOB,
    "kind": "QLoRASweep",
    "spec": {"template": {"spec": JOB["spec"]}, "grid": {"learningRate": [1e-4, 2e-4]}},
}
CASES = [(JOB, *case) for case in FIELDS["job"]] + [(SWEEP, *case) for case in FIELDS["sweep"]]


@pytest.mark.parametrize(("document", "path", "value", "line"), CASES, ids=[line for *_, line in CASES])
def test_a_wrong_field_is_the_only_problem_and_reported_with_its_remedy(
    tmp_path: Path, document: dict[str, Any], path: str, value: Any, line: str
) -> None:
    changed = without(document, path) if value is None else with_value(document, path, value)
    (tmp_path / "job.json").write_text(json.dumps(changed))
    with pytest.raises(ManifestError) as rejected:
        load_manifest(tmp_path / "job.json")
    [problem] = [found.split(": ", 1)[1] for found in str(rejected.value).splitlines()]
    assert problem.startswith(line.removesuffix("…")) if line.endswith("…") else problem == line
    assert "[a-z" not in problem


def test_problems_are_in_the_order_of_the_lines(tmp_path: Path) -> None:
    spec = {"queue": "team-a", **JOB["spec"], "resources": {"gpus": 0}}
    (tmp_path / "job.json").write_text(json.dumps({**JOB, "spec": spec}, indent=1))
    with pytest.raises(ManifestError) as rejected:
        load_manifest(tmp_path / "job.json")
    fields = [found.split(": ")[1] for found in str(rejected.value).splitlines()]
    assert fields == ["spec.queue", "spec.resources.gpus"]


@pytest.mark.parametrize("model", [QLoRAJobDocument, QLoRASweepDocument])
def test_each_pattern_of_the_schema_has_words(model: type[QLoRAJobDocument | QLoRASweepDocument]) -> None:
    def patterns(schema: Any) -> Iterator[str]:
        if isinstance(schema, list):
            for inner in schema:
                yield from patterns(inner)
        if isinstance(schema, dict):
            if isinstance(schema.get("pattern"), str):
                yield schema["pattern"]
            yield from patterns(list(schema.values()))

    found = set(patterns(model.model_json_schema()))
    assert found
    assert found <= WORDS_OF_PATTERN.keys()
