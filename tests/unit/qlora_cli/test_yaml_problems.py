"""The answer to a manifest that is not YAML: the line, what is there, and what to write."""

from pathlib import Path

import pytest

from qlora_cli.manifest import ManifestError, load_manifest

SPEC = "spec:\n  model:\n    source: pvc://a/b\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f"{SPEC}  lora: {{rank: 8}}\n    training:\n      maxSteps: 3\n",
            "5: is indented by 4, its neighbors by 2: ",
        ),
        (f"{SPEC}   lora:\n    rank: 8\n", "4: is indented by 3, its neighbors by 4: indent fields of the same object"),
        (f"{SPEC} lora:\n    rank: 8\n", "4: is indented by 1, its neighbors by 2: "),
        (f"{SPEC}      revision: main\n", "4: is indented by 6, its neighbors by 4: "),
        (f"{SPEC}\n# the data\n     revision: main\n", "6: is indented by 5, its neighbors by 4: "),
        ("spec:\n  mix:\n    - source: pvc://a/b\n       weight: 1\n", "4: is indented by 7, its neighbors by 6: "),
        (f"{SPEC}\tlora: 3\n", "4: a tab is in front of the text: indent with spaces"),
        (f"{SPEC}  lora:\n  \trank: 8\n", "5: a tab is in front of the text: indent with spaces"),
        ("kind: QLoRAJob: 1\n", "1: a second ': ' in a line: put the value in quotes"),
        (f"{SPEC}  lora\n  training:\n    maxSteps: 3\n", "4: has no ': ' after the name: write `name: value`"),
        ('kind: "QLoRAJob\nmetadata:\n  name: a\n', "1: a text in quotes begins here and does not end: close it"),
        ("spec:\n  lora: {rank: 8\n  training: 3\n", "2: a [ or { begins here and does not end, or a comma is missing"),
        ("kind: a\nkind: b\n", '2: found duplicate key "kind"'),
    ],
)
def test_an_error_of_notation_names_the_line_and_the_remedy(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ManifestError) as rejected:
        load_manifest(tmp_path / "job.yaml")
    assert str(rejected.value).startswith(f"{tmp_path / 'job.yaml'}:{words}")


def test_a_file_of_rows_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(
        ManifestError, match=r"train.jsonl.gz: has rows, and this command reads a manifest, whose dataset"
    ):
        load_manifest(tmp_path / "train.jsonl.gz")
