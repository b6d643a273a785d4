"""Which files of a hub repository are a configuration and split of its data set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.read.hub_splits import EVALUATION, TRAINING, Wanted, choose_data_files, read_dataset_card

SPLIT = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet")
CONFIGS = ("en/train-0.jsonl", "en/dev.jsonl", "de/train-0.jsonl", "README.md")
CARD = {
    "configs": [
        {
            "config_name": "en",
            "data_files": [{"split": "train", "path": "en/*"}, {"split": "validation", "path": "dev/en.csv"}],
        },
        {"config_name": "de", "data_files": [{"split": "train", "path": ["de/a.csv", "de/**/b.csv"]}], "default": True},
        {"config_name": "fr", "data_dir": "fr"},
    ]
}
CARD_FILES = (
    "en/a.csv",
    "en/b.csv",
    "en/more/c.csv",
    "dev/en.csv",
    "de/a.csv",
    "de/x/y/b.csv",
    "fr/train.csv",
    "fr/test.csv",
)


@pytest.mark.parametrize(
    ("names", "card", "path", "wanted", "chosen"),
    [
        (SPLIT, None, "", TRAINING, SPLIT[:2]),
        (SPLIT, None, "", EVALUATION, SPLIT[2:]),
        (SPLIT, None, "", Wanted(("test",)), SPLIT[2:]),
        (SPLIT, None, "data", TRAINING, SPLIT[:2]),
        (SPLIT, None, SPLIT[2], TRAINING, SPLIT[2:]),
        (("a.jsonl", "b.jsonl.gz", "README.md"), None, "", TRAINING, ("a.jsonl", "b.jsonl.gz")),
        (("train.csv", "valid.csv", "test.csv"), None, "", EVALUATION, ("valid.csv",)),
        (("restrain.csv", "train2.csv"), None, "", TRAINING, ("train2.csv",)),
        (CONFIGS, None, "", Wanted(("train",), "en"), ("en/train-0.jsonl",)),
        (CONFIGS, None, "", Wanted(EVALUATION.splits, "en"), ("en/dev.jsonl",)),
        (CARD_FILES, CARD, "", TRAINING, ("de/a.csv", "de/x/y/b.csv")),
        (CARD_FILES, CARD, "", Wanted(("train",), "en"), ("en/a.csv", "en/b.csv")),
        (CARD_FILES, CARD, "", Wanted(EVALUATION.splits, "en"), ("dev/en.csv",)),
        (CARD_FILES, CARD, "", Wanted(("test",), "fr"), ("fr/test.csv",)),
        (CARD_FILES, CARD, "en", TRAINING, ("en/a.csv", "en/b.csv")),
        (("a.csv", "b.csv"), {"configs": [{"config_name": "x", "data_files": "b.csv"}]}, "", TRAINING, ("b.csv",)),
        (
            ("a.csv", "b.csv"),
            {"configs": [{"config_name": "x", "data_files": {"train": "a.*", "test": "b.csv"}}]},
            "",
            Wanted(("test",)),
            ("b.csv",),
        ),
        (("train.csv",), {"configs": [{"config_name": "default"}], "license": "mit"}, "", TRAINING, ("train.csv",)),
    ],
)
def test_the_files_of_a_layout_are_found(
    names: tuple[str, ...], card: Mapping[str, Any] | None, path: str, wanted: Wanted, chosen: tuple[str, ...]
) -> None:
    assert choose_data_files(names, card, path, wanted, "hf://a/b") == list(chosen)


@pytest.mark.parametrize(
    ("names", "card", "path", "wanted", "message"),
    [
        (("model.bin",), None, "", TRAINING, "hf://a/b has no data file; it has none; allowed are .jsonl"),
        (SPLIT, None, "", Wanted(("dev",)), "hf://a/b has no data file of the split 'dev': set spec.dataset.split, or"),
        (SPLIT[:1], None, "", EVALUATION, "hf://a/b has no data file of the split 'validation' or 'test'"),
        (SPLIT, None, "more", TRAINING, "hf://a/b has no data file or folder 'more'; it has data/test-00000"),
        (CONFIGS, None, "", Wanted(("train",), "fr"), "hf://a/b has no configuration 'fr' (spec.dataset.config): neit"),
        (("train.csv", "train.jsonl"), None, "", TRAINING, "hf://a/b has files of several kinds, .csv and .jsonl"),
        (CARD_FILES, CARD, "", Wanted(("train",), "it"), "hf://a/b has no configuration 'it' (spec.dataset.config); i"),
        (CARD_FILES, CARD, "", Wanted(("test",), "en"), "hf://a/b has no split 'test' in configuration 'en'; it has t"),
        (("x.csv",), CARD, "", TRAINING, "hf://a/b: its README.md names de/a.csv, de/**/b.csv for the split 'train',"),
        (
            ("a.csv",),
            {"configs": [{"config_name": name, "data_files": "a.csv"} for name in "xy"]},
            "",
            TRAINING,
            "hf://a/b has several configurations, x, y: set spec.dataset.config to one of them",
        ),
        (("a.csv",), {"configs": "all"}, "", TRAINING, "hf://a/b/README.md: configs is not a list of entries"),
        (("a.csv",), {"configs": [{"config_name": "x", "data_files": [{"path": 1}]}]}, "", TRAINING, "hf://a/b/README"),
        (("a.csv",), {"configs": [{"config_name": "x", "data_files": "*a" * 9}]}, "", TRAINING, "hf://a/b/README.md:"),
    ],
)
def test_a_missing_or_ambiguous_split_is_rejected_with_the_existing_ones(
    names: tuple[str, ...], card: Mapping[str, Any] | None, path: str, wanted: Wanted, message: str
) -> None:
    with pytest.raises(StepFailure) as failure:
        choose_data_files(names, card, path, wanted, "hf://a/b")
    assert failure.value.message.startswith(message)


def test_a_card_is_the_yaml_at_its_top(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n---\n# Title\n")
    assert read_dataset_card(tmp_path / "README.md", "hf://a/b") == {"configs": [{"config_name": "x"}]}
    (tmp_path / "README.md").write_text("# Title\n")
    assert read_dataset_card(tmp_path / "README.md", "hf://a/b") == {}
    (tmp_path / "README.md").write_text("---\na: !!python/object/apply:os.system ['true']\n---\n")
    with pytest.raises(StepFailure, match=r"hf://a/b/README.md: the text between its --- lines is not YAML"):
        read_dataset_card(tmp_path / "README.md", "hf://a/b")
