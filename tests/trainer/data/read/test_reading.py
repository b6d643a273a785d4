"""Valid data of every file kind and source, and the rows read from it."""

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.data.read.reading import DATA_ENDINGS
from qlora_trainer.data.statistics import DataStatistics
from qlora_trainer.steps.prepare import prepare
from tests.support.fake_hub import OTHER_COMMIT, FakeHub, serve
from tests.support.good_files import GOOD_FILES, ROWS
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.rejected.made import GOOD
from tests.trainer.conftest import MakeContext


def test_a_link_out_of_the_volume_is_rejected(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text(GOOD)
    (tmp_path / "data" / "train.jsonl").symlink_to("../secret")
    with pytest.raises(StepFailure, match="is a link that leads out of its folder") as failure:
        prepare(make_context(), records)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pvc://elsewhere/train.jsonl", "volume claim 'elsewhere' is not mounted"),
        ("configMap://rows/train.jsonl", "ConfigMap 'rows' with key 'train.jsonl' does not exist"),
    ],
)
def test_a_missing_volume_or_config_map_is_retried(
    make_context: MakeContext, records: Recorded, source: str, message: str
) -> None:
    with pytest.raises(StepFailure, match=message) as failure:
        prepare(make_context({"dataset": {"source": source}}), records)
    assert failure.value.exit_code is ExitCode.UNREACHABLE


def train_bytes(context: StepContext, record: PrepareRecord) -> bytes:
    return (context.workspace.root / record.data_path / "train.safetensors").read_bytes()


def statistics(context: StepContext, record: PrepareRecord) -> DataStatistics:
    return DataStatistics.read(context.workspace.root / record.data_path)


def test_every_kind_of_file_gives_the_same_tokens(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    """Byte order marks, blank lines and Windows' or missing line ends change nothing."""
    data = tmp_path / "data"
    data.mkdir()
    written = set()
    for ending, contents in GOOD_FILES.items():
        for number, content in enumerate(contents):
            name = f"{number}{ending}"
            (data / name).write_bytes(content)
            context = make_context({"dataset": {"source": f"pvc://data/{name}"}})
            record = prepare(context, records)
            assert (record.dataset.format, record.dataset.rows) == ("prompt-completion", 3), name
            written.add(train_bytes(context, record))
    assert len(written) == 1


def test_every_ending_that_is_allowed_has_a_good_file() -> None:
    assert {ending for name in GOOD_FILES for ending in re.findall(r"\.\w+", name)} == {
        *re.findall(r"\.\w+", DATA_ENDINGS)
    }


@pytest.mark.parametrize("dictionaries", [True, False])
def test_a_parquet_file_without_rows_is_rejected(
    make_context: MakeContext, records: Recorded, tmp_path: Path, dictionaries: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), data / "none.parquet", use_dictionary=dictionaries)
    with pytest.raises(StepFailure, match=r"pvc://data/none\.parquet has no rows"):
        prepare(make_context({"dataset": {"source": "pvc://data/none.parquet"}}), records)


def test_a_parquet_file_that_crashes_its_reader_is_named(
    make_context: MakeContext, records: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **_options: os.kill(os.getpid(), SIGKILL))
    with pytest.raises(
        StepFailure, match=r"a\.parquet cannot be read as Parquet \(.* ended by signal or exit code -9"
    ) as failure:
        prepare(make_context({"dataset": {"source": "pvc://data/a.parquet"}}), records)
    assert failure.value.exit_code is ExitCode.BAD_DATASET


def test_the_files_of_a_folder_are_one_data_set(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    """In order of names; SHA-256 is that of the output of `sha256sum *.jsonl*`."""
    rows = [chat_row(f"Which {n}?", "This.") for n in range(6)]
    folder = tmp_path / "data" / "rows"
    write_rows(folder / "part-2.jsonl", rows[4:])
    (folder / "part-1.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows[:4]).encode())
    )
    (folder / "README.md").write_text("not data")
    (folder / ".part-0.jsonl").write_text("hidden")
    write_rows(tmp_path / "data" / "all.jsonl", rows)
    printed = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in ("part-1.jsonl.gz", "part-2.jsonl"))
    (tmp_path / "printed").write_text(printed)
    pin = file_sha256(tmp_path / "printed")
    whole = make_context({"dataset": {"source": "pvc://data/all.jsonl"}})
    parts = make_context({"dataset": {"source": "pvc://data/rows", "sha256": pin}})
    found = prepare(parts, records)
    assert train_bytes(parts, found) == train_bytes(whole, prepare(whole, records))
    assert found.dataset.sha256 == pin
    write_rows(folder / "part-3.jsonl", rows)
    with pytest.raises(StepFailure, match=r"pvc://data/rows has SHA-256 [0-9a-f]{64}, but spec.dataset.sha256 is"):
        prepare(parts, records)


def test_a_file_that_changes_while_it_is_read_is_rejected(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    """It shrinks after its digest was taken, before its rows are tokenized."""
    path = write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Which {n}?", "This.") for n in range(200)])

    class Shrinking(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("tokenizing"):
                path.write_text(GOOD)

    with pytest.raises(
        StepFailure, match=r"pvc://data/train.jsonl changed while it was read: start the job again"
    ) as failure:
        prepare(make_context(), Shrinking())
    assert failure.value.exit_code is ExitCode.BAD_DATASET


def test_the_statistics_report_read_and_dropped_rows(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    rows = [{**chat_row(f"Which {n}?", "This."), "source": "web"} for n in range(30)]
    rows[7] = {**chat_row("Long?", "word " * 100), "source": "web"}
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    context = make_context({"dataset": {"eval": {"fraction": 0.2}}})
    record = prepare(context, records)
    found = statistics(context, record)
    [source] = found.sources
    assert (source.format, source.columns, source.ignored_columns) == ("chat", ("messages",), ("source",))
    assert (source.rows_read, source.lengths.longest) == (30, record.dataset.longest_row_tokens)
    assert sum(bar.rows for bar in source.lengths.histogram) == 30
    [dropped] = source.dropped
    assert (dropped.rows, dropped.first) == (1, "pvc://data/train.jsonl line 8")
    assert dropped.reason == "longer than 64 tokens (spec.training.maxSequenceLength)"
    assert found.eval is not None
    assert (found.train.rows, found.eval.rows) == (23, 6)
    assert found.train.tokens == record.dataset.tokens
    assert found.train.packing_efficiency == round(found.train.tokens / (found.train.sequences * 64), 4) > 0.7
    assert 0 < found.train.target_tokens < found.train.tokens


def test_the_seed_chooses_the_rows_with_shuffle(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    """Each seed chooses others; without shuffle they are the first ones."""
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "a " * (n + 1)} for n in range(40)])

    def tokens(shuffle: bool, seed: int) -> int:
        dataset = {"maxRows": 5, "shuffle": shuffle}
        status = prepare(make_context({"dataset": dataset, "training": {"seed": seed}}), records).dataset
        assert (status.rows, status.used_rows) == (5, 5)
        return status.tokens

    assert tokens(False, 0) == tokens(False, 1) < tokens(True, 0) != tokens(True, 1)
    assert tokens(True, 0) == tokens(True, 0)


@pytest.mark.parametrize(("dataset", "told"), [({}, True), ({"maxRows": 5}, False)])
def test_a_shuffle_without_effect_is_logged(
    make_context: MakeContext,
    records: Recorded,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dataset: dict[str, Any],
    told: bool,
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    prepare(make_context({"dataset": {"shuffle": True, **dataset}}), records)
    assert ("spec.dataset.shuffle has no effect without spec.dataset.maxRows" in caplog.text) is told


def test_rows_of_a_config_map_are_read(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    """A mounted ConfigMap is made of links, as the kubelet makes them."""
    mounted = tmp_path / "config-maps" / "rows"
    write_rows(mounted / "..2026" / "train.jsonl", [chat_row("Which?", "This.")])
    (mounted / "..data").symlink_to("..2026")
    (mounted / "train.jsonl").symlink_to("..data/train.jsonl")
    record = prepare(make_context({"dataset": {"source": "configMap://rows/train.jsonl"}}), records)
    assert record.dataset.used_rows == 1


def test_evaluation_rows_with_another_digest_are_rejected(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    path = write_rows(tmp_path / "data" / "eval.jsonl", ROWS[:2])
    evaluation = {"source": "pvc://data/eval.jsonl", "sha256": file_sha256(path)}
    context = make_context({"dataset": {"eval": evaluation}})
    assert prepare(context, records).dataset.eval_rows == 2
    write_rows(path, ROWS[:1])
    with pytest.raises(StepFailure, match=r"eval.jsonl has SHA-256 \w{64}, but spec.dataset.eval.sha256 is") as failure:
        prepare(context, records)
    assert failure.value.exit_code is ExitCode.BAD_DATASET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with acme/rows and acme/other: two configurations with three splits each."""
    repositories = {f"datasets/acme/{name}": tmp_path / "hub" / name for name in ("rows", "other")}
    for folder in repositories.values():
        for config, rows in (("small", 1), ("large", 4)):
            for extra, split in enumerate(("train", "validation", "test")):
                write_rows(folder / config / f"{split}.jsonl", ROWS[:1] * (rows + extra))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(FakeHub(repositories, commits=dict.fromkeys(repositories, OTHER_COMMIT))) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


AT_COMMIT = f"/revision/{OTHER_COMMIT}"


@pytest.mark.parametrize(
    ("dataset", "evaluation", "rows", "listed"),
    [
        ({}, {"source": "hf://acme/other", "config": "large"}, 5, ["rows", "other"]),
        ({}, {"source": "hf://acme/other", "config": "large", "split": "test"}, 6, ["rows", "other"]),
        (
            {},
            {"source": "hf://acme/other", "config": "small", "revision": OTHER_COMMIT},
            2,
            ["rows", f"other{AT_COMMIT}"],
        ),
        ({}, {"source": "hf://acme/rows", "revision": OTHER_COMMIT}, 2, ["rows", f"rows{AT_COMMIT}"]),
        ({"revision": OTHER_COMMIT}, {"source": "hf://acme/rows"}, 2, [f"rows{AT_COMMIT}", f"rows{AT_COMMIT}"]),
        ({}, {"source": "hf://acme/rows", "config": "large", "split": "train"}, 4, ["rows", "rows"]),
    ],
)
def test_evaluation_rows_come_from_the_named_revision_configuration_and_split(
    make_context: MakeContext,
    records: Recorded,
    hub: FakeHub,
    dataset: dict[str, Any],
    evaluation: dict[str, Any],
    rows: int,
    listed: list[str],
) -> None:
    """An omitted field is that of the training data if both share a repository."""
    training = {"source": "hf://acme/rows", "config": "small", **dataset}
    record = prepare(make_context({"dataset": {**training, "eval": evaluation}}), records)
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (1, rows)
    asked = [line.partition("/api/datasets/acme/")[2] for line in hub.requests if "/api/" in line]
    assert asked == listed


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"split": "dev"}, r"no data file of the split 'dev': set spec\.dataset\.eval\.split"),
        ({"config": "middle"}, r"no configuration 'middle' \(spec\.dataset\.eval\.config\)"),
        ({"revision": "v9"}, "hf://acme/other has no revision 'v9'"),
    ],
)
def test_incomplete_evaluation_rows_are_rejected_with_the_missing_field(
    make_context: MakeContext, records: Recorded, evaluation: dict[str, str], message: str
) -> None:
    dataset = {"source": "hf://acme/rows", "config": "small", "eval": {"source": "hf://acme/other", **evaluation}}
    with pytest.raises(StepFailure, match=message) as failure:
        prepare(make_context({"dataset": dataset}), records)
    assert failure.value.exit_code is ExitCode.BAD_DATASET
