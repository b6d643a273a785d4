"""Parsers of data sets, a model's configuration and weights, and files between steps."""

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy
import pyarrow
import torch
from safetensors.numpy import save
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec, QuantizationSpec
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.examples.formats import RowReader, detect_format
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.reading import read_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.statistics import STATISTICS, DataStatistics
from qlora_trainer.data.tokenize.chunks import Chunk, Limits, TokenizedRows
from qlora_trainer.history.metrics_log import read_history
from qlora_trainer.history.samples import read_samples
from qlora_trainer.model.base.artifact import MANIFEST as BASE_MANIFEST
from qlora_trainer.model.base.artifact import require_sha256
from qlora_trainer.model.base.cache import DamagedCacheError, manifest_of
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.nf4.stored_layer import StoredTensor
from qlora_trainer.model.source.files import require_whole
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE, read_attempts, write_attempts
from qlora_trainer.training.checkpoints.checkpoint import read_checkpoint
from tests.fuzz.target import Target
from tests.support.runs.checkpoints import state_of

_ROWS = (
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a é"}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "thinking": "t", "weight": 1},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "i", "input": "n", "output": "o"},
    {"prompt": "p", "completion": "c"},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"text": "plain"},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}], "rejected": []},
)
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_TIME = "2026-01-02T12:00:00Z"
_ATTEMPT = {"podUid": "pod", "startedAt": _TIME, "fromStep": 2, "ended": "interrupted"}
_ADAPTER = {
    "uri": "pvc://a/b",
    "sha256": "0" * 64,
    "sizeBytes": 1,
    "baseModel": "hf://a/b",
    "baseRevision": "c0ffee",
    "rank": 4,
    "servedRank": 8,
    "quantization": "nf4",
}
_PREPARED = {
    "fingerprint": "f",
    "modelPath": "model",
    "modelRevision": "c0ffee",
    "basePath": "base",
    "baseSha256": "0",
    "dataPath": "data",
    "targetModules": ["a"],
    "packed": True,
    "modelType": "llama",
    "memory": {"estimateBytes": 1, "lowBytes": 1, "highBytes": 1, "verdict": "unknown"},
    "dataset": {"format": "chat", "rows": 1, "usedRows": 1},
}
_TRAINED = {
    "fingerprint": "f",
    "adapterPath": "a",
    "adapterSha256": "0",
    "trainingStep": 1,
    "loss": 1.5,
    "quantizedLayers": [{"name": "q_proj", "shape": [64, 64], "count": 2, "bytesEach": 3208}],
}
_SPLIT = {
    "rows": 1,
    "tokens": 2,
    "targetTokens": 1,
    "sequences": 1,
    "sequenceLength": 8,
    "packed": True,
    "packingEfficiency": 0.25,
}

_DATASET, _CONFIGURATION, _UNAVAILABLE, _UNSAFE = (
    ExitCode.BAD_DATASET,
    ExitCode.BAD_CONFIGURATION,
    ExitCode.MODEL_UNAVAILABLE,
    ExitCode.UNSAFE_ARTIFACT,
)

Result = TypeVar("Result")


def _written(content: bytes, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _rows_of(name: str) -> Callable[[bytes, Path], None]:
    """Reads a data file of that name, and each of its rows as an example."""

    def read(content: bytes, folder: Path) -> None:
        count = 0
        for row in read_rows([DataFile(_written(content, folder / name), f"pvc://data/{name}")]):
            count += 1
            _read_example(row)
        assert count

    return read


def _read_example(row: Row) -> None:
    """A row that is no example, or no pair, must not end the reading of the others here."""
    for pairs in (False, True):
        try:
            format_, columns = detect_format(row, None, pairs=pairs)
            RowReader(format_, columns).read(row)
            if format_ in ("chat", "sharegpt"):
                RowReader(format_, columns, marked=True).read(row)
        except StepFailure as failure:
            if failure.exit_code is not _DATASET or not failure.message.startswith(row.location):
                raise AssertionError(f"{failure.exit_code!r}: {failure.message}") from failure


def _zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def _family(content: bytes, folder: Path) -> None:
    family = inspect_family(_written(content, folder / "config.json").parent, LoraSpec())
    assert family.target_modules


@cache
def _model() -> Any:
    """A model without weights, to go with the files' weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**_LLAMA))


def _weights(content: bytes, folder: Path) -> None:
    path = _written(content, folder / "model.safetensors")
    require_whole(path, "model.safetensors")
    BaseWeights(folder, _model())


def _stored_layer(content: bytes, _folder: Path) -> None:
    tensor = torch.tensor(list(content), dtype=torch.uint8)
    _LAYER.require_header("U8", tuple(tensor.shape))
    described = json.loads(bytes(_LAYER.ours(tensor).tolist()))
    assert described == json.loads(_LAYER_STATE)


_LAYER = StoredTensor(
    "quant_state.bitsandbytes__fp4", "U8", (256,), (128, 64), QuantizationSpec(type="fp4", double_quant=False)
)
_LAYER_STATE = b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]}'


def _indexed_weights(content: bytes, folder: Path) -> None:
    (folder / "indexed").mkdir(exist_ok=True)
    BaseWeights(_written(content, folder / "indexed" / "model.safetensors.index.json").parent, _model())


def _cached_model(content: bytes, folder: Path) -> None:
    place = folder / "cached"
    _written(b"{}", place / "config.json")
    _written(content, place / BASE_MANIFEST)
    assert manifest_of(place).files["config.json"].size == 2


def _base_manifest(content: bytes, folder: Path) -> None:
    place = folder / "base"
    _written(b"{}", place / "model.safetensors")
    _written(content, place / BASE_MANIFEST)
    require_sha256(place, "0" * 64)


def _checkpoint_of(name: str) -> Callable[[bytes, Path], None]:
    """Reads a checkpoint with this content in the file of that name, and matching digests."""

    def read(content: bytes, folder: Path) -> None:
        place = folder / "step-2"
        shutil.rmtree(place, ignore_errors=True)
        _written(_STATE, place / "state.json")
        sums = {"state.json": sha256(content if name == "state.json" else _STATE).hexdigest()}
        _written(json.dumps({"sha256": sums}).encode(), place / "manifest.json")
        _written(content, place / name)
        assert read_checkpoint(place).step == 2 or name == "state.json"

    return read


_STATE = json.dumps({"formatVersion": 1, "step": 2, **state_of(2)}).encode()


def _completions(content: bytes, folder: Path) -> None:
    path = _written(content, folder / "prepare.json")
    kinds: tuple[Any, ...] = (PrepareRecord, TrainRecord, PublishRecord)
    for kind in kinds:
        record = read_completion(path, kind)
        if record is not None:
            try:
                write_completion(folder / "again.json", record)
            except ValueError:  # an infinite loss, which training does not write
                continue
            assert read_completion(folder / "again.json", kind) == record


def _attempts(content: bytes, folder: Path) -> None:
    _written(content, folder / ATTEMPTS_FILE)
    attempts = read_attempts(folder)
    write_attempts(folder, attempts)
    assert read_attempts(folder) == attempts


def _history(content: bytes, folder: Path) -> None:
    path = _written(content, folder / "metrics.jsonl")
    try:
        curve = read_history(path).loss
    except ValueError as error:
        if not str(error).startswith(f"{path}:"):
            raise AssertionError("the message does not say where") from error
        raise
    assert len(curve.steps) == len(curve.values)


def _samples(content: bytes, folder: Path) -> None:
    samples = read_samples(_written(content, folder / "samples.json"))
    assert samples.samples or samples.missing is not None


def _statistics(content: bytes, folder: Path) -> None:
    _written(content, folder / STATISTICS)
    found = DataStatistics.read(folder)
    found.write(folder)
    assert DataStatistics.read(folder) == found


def _chunk(content: bytes, folder: Path) -> None:
    chunk = Chunk.read(_written(content, folder / "chunk.safetensors"), Limits(vocabulary=8, longest=4))
    if chunk is not None and len(chunk.lengths):
        rows = TokenizedRows([chunk])
        found = rows.input_ids(numpy.arange(len(rows)))
        assert len(found) == rows.lengths.sum()
        assert all(0 <= token < 8 for token in found)


def _split(content: bytes, folder: Path) -> None:
    data = PreparedDataset(_written(content, folder / "train.safetensors"))
    assert data.rows >= 0


def _seed_chunk() -> bytes:
    row = TokenizedRow(numpy.array([1, 7, 2], numpy.int32), numpy.array([False, True, True]))
    with TemporaryDirectory() as folder:
        path = Path(folder, "chunk.safetensors")
        Chunk.from_rows([row, row]).write(path)
        return path.read_bytes()


def _seed_split() -> bytes:
    tensors = {
        "token_offsets": numpy.array([0, 2], numpy.int64),
        "segment_offsets": numpy.array([0, 1], numpy.int64),
        "input_ids": numpy.array([1, 2], numpy.int32),
        "segment_lengths": numpy.array([2], numpy.int32),
        "is_target": numpy.array([0, 1], numpy.uint8),
    }
    return save(tensors, metadata={"prepared": json.dumps({"format": 2, "targetTokens": 1})})


def _data(name: str, *seeds: bytes) -> Target:
    return Target(_rows_of(name), seeds, exit_codes=(_DATASET,))


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


FILES: dict[str, Target] = {
    "jsonl": _data("a.jsonl", _LINES, b"\xef\xbb\xbf" + _LINES),
    "json": _data("a.json", _json(_ROWS), _LINES),
    "csv": _data("a.csv", b'prompt,completion\np,c\n"a ""b""\nc",d\n'),
    "gzip": _data("a.jsonl.gz", gzip.compress(_LINES)),
    "bzip2": _data("a.jsonl.bz2", bz2.compress(_LINES)),
    "xz": _data("a.jsonl.xz", lzma.compress(_LINES)),
    "zstandard": _data("a.jsonl.zst", _zstandard(_LINES)),
    "family": Target(
        _family,
        (
            _json(_LLAMA),
            _json(_LLAMA | {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["a.b"]}}),
        ),
        exit_codes=(_CONFIGURATION, _UNSAFE, _UNAVAILABLE),
    ),
    "weights": Target(_weights, (_seed_chunk(),), exit_codes=(_UNAVAILABLE,)),
    "stored-layer": Target(_stored_layer, (_LAYER_STATE,), rejections=(ValueError,)),
    "indexed-weights": Target(
        _indexed_weights,
        (_json({"weight_map": {"a": "model-1.safetensors"}}),),
        exit_codes=(_UNAVAILABLE, _UNSAFE),
    ),
    "cached-model": Target(
        _cached_model,
        (
            _json(
                {
                    "address": "a",
                    "version": "v",
                    "quantization": {},
                    "sources": {},
                    "files": {"config.json": {"sha256": "0", "size": 2}},
                }
            ),
        ),
        (DamagedCacheError,),
    ),
    "base-manifest": Target(
        _base_manifest,
        (
            _json(
                {
                    "version": "v",
                    "quantization": {},
                    "sources": {"model.safetensors": "0"},
                    "files": {"model.safetensors": {"sha256": "0", "size": 2}},
                }
            ),
        ),
        exit_codes=(_UNSAFE,),
    ),
    "checkpoint-manifest": Target(
        _checkpoint_of("manifest.json"),
        (_json({"sha256": {"state.json": sha256(_STATE).hexdigest()}}), _json({"sha256": {"/dev/zero": "0"}})),
        (ValueError,),
    ),
    "checkpoint-state": Target(_checkpoint_of("state.json"), (_STATE,), (ValueError,)),
    "completion": Target(
        _completions, (_json(_PREPARED), _json(_TRAINED), _json({"fingerprint": "", "adapter": _ADAPTER}))
    ),
    "attempts": Target(_attempts, (_json(_ATTEMPT) + b"\n" + _json(_ATTEMPT) + b"\n",)),
    "history": Target(
        _history, (b'{"step": 1, "loss": 2.5, "gradNorm": 1}\n{"step": 2, "evalLoss": 2}\n',), (ValueError,)
    ),
    "samples": Target(
        _samples, (_json({"samples": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}]}),)
    ),
    "statistics": Target(_statistics, (_json({"sources": [], "train": _SPLIT}),), (ValueError,)),
    "chunk": Target(_chunk, (_seed_chunk(),)),
    "split": Target(_split, (_seed_split(),), (ValueError,)),
}
