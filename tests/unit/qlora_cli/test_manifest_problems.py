"""The answer to a wrong field of a manifest: the words of the manifest, and a valid value."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.manifest import ManifestError, load_manifest
from qlora_cli.manifest_problems import WORDS_OF_PATTERN

JOB: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
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
PART = {"source": "pvc://data/a.jsonl"}


def problems(folder: Path, document: dict[str, Any], path: str = "", value: Any = None) -> list[str]:
    """The lines for the document with `value` at `path`, without file and line."""
    document = deepcopy(document)
    if path:
        *around, last = path.split(".")
        node = document
        for part in around:
            node = node.setdefault(part, {})
        node[last] = value
    (folder / "job.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError) as rejected:
        load_manifest(folder / "job.json")
    return [line.split(": ", 1)[1] for line in str(rejected.value).splitlines()]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("spec.dataset.mix", [{**PART, "wieght": 1}], "spec.dataset.mix.0.wieght: unknown field; did you mean weight?"),
        ("spec.dataset.mix", [{**PART, "weight": 0}], "spec.dataset.mix.0.weight: found 0, must be greater than 0"),
        (
            "spec.dataset.mix",
            ["pvc://data/a.jsonl"],
            (
                'spec.dataset.mix.0: found "pvc://data/a.jsonl", must be an object with columns, config, format, '
                "revision, sha256, source, split, weight"
            ),
        ),
        (
            "spec.lora.targetModules",
            ["q proj"],
            "spec.lora.targetModules.0: found \"q proj\", must be letters, digits, '-', '_' and '.'",
        ),
    ],
)
def test_a_wrong_entry_of_a_list_is_the_only_problem(tmp_path: Path, path: str, value: Any, line: str) -> None:
    assert problems(tmp_path, JOB, path, value) == [line]


@pytest.mark.parametrize(
    ("document", "path", "value", "line"),
    [
        (JOB, "spec.dataset.mix", [], "spec.dataset.mix: has 0 entries, must have at least 1"),
        (JOB, "spec.dataset.mix", [PART] * 17, "spec.dataset.mix: has 17 entries, must have at most 16"),
        (SWEEP, "spec.cells", [{"rank": 8}] * 65, "spec.cells: has 65 entries, must have at most 64"),
    ],
)
def test_a_list_of_the_wrong_length_is_counted(
    tmp_path: Path, document: dict[str, Any], path: str, value: Any, line: str
) -> None:
    assert problems(tmp_path, document, path, value) == [line]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "spec.gate.score",
            {"check": "jsonSchema", "schema": {"type": "object"}},
            "spec.gate.score.schema: found an object, must be text; write `schema: |`, and the JSON in the lines below",
        ),
        (
            "spec.dataset.mix",
            PART,
            "spec.dataset.mix: found an object, must be a list: in [ ], or with '- ' before each entry",
        ),
        (
            "spec.training.trainOn",
            ["last"],
            "spec.training.trainOn: found a list, must be 'completion', 'last', 'marked' or 'all'",
        ),
        (
            "spec.dataset.chatTemplate",
            {"configMap": "ours"},
            "spec.dataset.chatTemplate: found an object, must be text, such as chatml or configMap://NAME/KEY",
        ),
        ("spec.dataset.deduplicate", "yes", 'spec.dataset.deduplicate: found "yes", must be true or false'),
        ("spec.resources.cpu", 2, "spec.resources.cpu: found 2, must be text, in quotes"),
        (
            "spec.training.learningRate",
            "2e-4",
            'spec.training.learningRate: found "2e-4", must be a number, without quotes',
        ),
        ("spec.training.learningRate", "1.2.3", 'spec.training.learningRate: found "1.2.3", must be a number'),
        ("spec.training.maxSteps", "9", 'spec.training.maxSteps: found "9", must be a whole number, without quotes'),
        ("spec.training.maxSteps", "9.5", 'spec.training.maxSteps: found "9.5", must be a whole number'),
        ("spec.training.maxSteps", "none", 'spec.training.maxSteps: found "none", must be a whole number'),
        (
            "spec.gate.minImprovement",
            10,
            "spec.gate.minImprovement: found 10, must be less than 1; it is a share: 0.1 is 10 percent",
        ),
        (
            "spec.gate",
            {"minScore": 80, "score": {"check": "exactMatch"}},
            "spec.gate.minScore: found 80, must be less than or equal to 1; it is a share: 0.1 is 10 percent",
        ),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_reported_with_the_allowed_ones(
    tmp_path: Path, path: str, value: Any, line: str
) -> None:
    assert problems(tmp_path, JOB, path, value) == [line]


@pytest.mark.parametrize(
    ("path", "value", "fields"),
    [
        ("spec.dataset.systemPrompt", "Be short.", "mode, text"),
        ("spec.lora.from", "pvc://a/b", "secretRef, sha256, source"),
        ("spec.gate.score", "exactMatch", "check, maxNewTokens, pattern, rows, schema"),
        ("spec.training.earlyStopping", 3, "minDelta, patience"),
    ],
)
def test_a_value_in_place_of_an_object_is_reported_with_the_fields(
    tmp_path: Path, path: str, value: Any, fields: str
) -> None:
    line = f"{path}: found {json.dumps(value)}, must be an object with {fields}"
    assert problems(tmp_path, JOB, path, value) == [line]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.lora.from", {"source": "pvc://a/b", "sha256": "A"}, '"A", must be 64 lower-case hexadecimal digits'),
        (
            "spec.continues",
            "Support_Bot",
            (
                '"Support_Bot", must be lower-case letters, digits and hyphens, with a letter or digit at both ends; '
                "it is the name of the job whose checkpoint is taken up"
            ),
        ),
        ("spec.resources.memory", "24 G", "\"24 G\", must be a number above 0, as in '2', '500m' or '24Gi'"),
    ],
)
def test_a_pattern_is_described_in_words(tmp_path: Path, path: str, value: Any, words: str) -> None:
    [line] = problems(tmp_path, JOB, path, value)
    assert f"found {words}" in line
    assert "[a-z" not in line


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


@pytest.mark.parametrize(
    ("found", "place"),
    [
        ("spec.training.beta", "spec.training.preference.beta"),
        ("spec.training.labelSmoothing", "spec.training.preference.labelSmoothing"),
        ("spec.training.patience", "spec.training.earlyStopping.patience"),
        ("spec.training.gate", "spec.gate"),
        ("spec.training.continues", "spec.continues"),
        ("spec.dataset.overlap", "spec.dataset.eval.overlap"),
        ("spec.dataset.trainOn", "spec.training.trainOn"),
        # Another is in dataset.columns: the nearest counts.
        ("spec.gate.check", "spec.gate.score.check"),
        ("spec.earlyStopping", "spec.training.earlyStopping"),
        ("spec.from", "spec.lora.from"),
        ("training", "spec.training"),
        ("spec.dataset.prompt", "spec.dataset.columns.prompt or spec.dataset.mix.columns.prompt"),
    ],
)
def test_a_misplaced_field_is_reported_with_its_place(tmp_path: Path, found: str, place: str) -> None:
    assert f"{found}: unknown field; it is {place}" in problems(tmp_path, JOB, found, 1)


def test_a_misplaced_field_of_a_template_is_reported_with_its_place(tmp_path: Path) -> None:
    [line] = problems(tmp_path, SWEEP, "spec.template.spec.training.rank", 8)
    assert line == "spec.template.spec.training.rank: unknown field; it is spec.template.spec.lora.rank"


@pytest.mark.parametrize(
    ("document", "path"),
    [(JOB, "spec.source"), (SWEEP, "spec.template.metadata"), (SWEEP, "spec.grid.beta")],
    ids=["in several places", "outside the spec", "not varied"],
)
def test_an_ambiguous_unknown_field_is_reported_with_the_allowed_ones(
    tmp_path: Path, document: dict[str, Any], path: str
) -> None:
    [line] = problems(tmp_path, document, path, {})
    assert line.startswith(f"{path}: unknown field; allowed are ")


def test_an_unknown_kind_is_the_only_problem_of_a_manifest(tmp_path: Path) -> None:
    line = 'kind: found "QloraSweep", must be QLoRAJob or QLoRASweep'
    assert problems(tmp_path, {**SWEEP, "kind": "QloraSweep"}) == [line]
    assert problems(tmp_path, {**SWEEP, "kind": []}) == ["kind: found a list, must be QLoRAJob or QLoRASweep"]
    without = {key: value for key, value in SWEEP.items() if key != "kind"}
    assert problems(tmp_path, without) == ["kind: is required and missing: QLoRAJob or QLoRASweep"]
