"""Parsers of data sets, a model's configuration and weights, and files between steps."""

import json
import shutil
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from safetensors.numpy import save
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec, QuantizationSpec
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.examples.formats import CONVERSATIONS, RowReader, detect_format
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
from qlora_trainer.model.protocols import Decoder
from qlora_trainer.model.source.files import require_whole
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE, read_attempts, write_attempts
from qlora_trainer.training.checkpoints.checkpoint import read_checkpoint
from tests.fuzz.target import Target, dumped, in_file
from tests.support.builders import ADAPTER, FOUND, MEMORY
from tests.support.good_files import GOOD_FILES
from tests.support.row_formats import GOOD_ROWS
from tests.support.runs.checkpoints import state_of

_LINES = b"".join(dumped(good.row) + b"\n" for good in GOOD_ROWS)
_LLAMA = b"""\
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
 "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
 "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}"""
_QUANTIZED = {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["a.b"]}}
_STATE = dumped({"formatVersion": 1, "step": 2, **state_of(2)})
_ATTEMPT = b'{"podUid": "pod", "startedAt": "2026-01-02T12:00:00Z", "fromStep": 2, "ended": "interrupted"}\n'
_PREPARED = b"""\
{"fingerprint": "f", "modelPath": "model", "modelRevision": "c0ffee", "basePath": "base", "baseSha256": "0",
 "dataPath": "data", "targetModules": ["a"], "packed": true, "modelType": "llama"}"""
_RECORDS = (
    PrepareRecord.model_validate(json.loads(_PREPARED) | {"memory": MEMORY, "dataset": FOUND}),
    TrainRecord(fingerprint="f", adapter_path="a", adapter_sha256="0", training_step=1, loss=1.5),
    PublishRecord(fingerprint="f", adapter=ADAPTER),
)
_BASE = b"""\
{"version": "v", "quantization": {}, "sources": {"model.safetensors": "0"},
 "files": {"model.safetensors": {"sha256": "0", "size": 2}}}"""
_CACHED = b"""\
{"address": "a", "version": "v", "quantization": {}, "sources": {},
 "files": {"config.json": {"sha256": "0", "size": 2}}}"""
_STATISTICS = b"""\
{"sources": [], "train": {"rows": 1, "tokens": 2, "targetTokens": 1, "sequences": 1, "sequenceLength": 8,
                          "packed": true, "packingEfficiency": 0.25}}"""
_METRICS = b'{"step": 1, "loss": 2.5, "gradNorm": 1}\n{"step": 2, "evalLoss": 2}\n'
_SAMPLES = b'{"samples": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}]}'
_LAYER = StoredTensor(
    "quant_state.bitsandbytes__fp4", "U8", (256,), (128, 64), QuantizationSpec(type="fp4", double_quant=False)
)
_LAYER_STATE = b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]}'
_DATASET, _CONFIGURATION, _UNAVAILABLE, _UNSAFE = (
    ExitCode.BAD_DATASET,
    ExitCode.BAD_CONFIGURATION,
    ExitCode.MODEL_UNAVAILABLE,
    ExitCode.UNSAFE_ARTIFACT,
)


def _data(ending: str, *seeds: bytes) -> Target:
    """Reads a data file with that ending, and each of its rows as an example."""

    def read(path: Path) -> None:
        count = 0
        for row in read_rows([DataFile(path, f"pvc://data/{path.name}")]):
            count += 1
            _read_example(row)
        assert count

    return Target(in_file(f"a{ending}", read), (*seeds, *GOOD_FILES[ending]), exit_codes=(_DATASET,))


def _read_example(row: Row) -> None:
    """Read a row. An invalid example or pair must not stop the reading of others."""
    for pairs in (False, True):
        try:
            format_, columns = detect_format(row, None, pairs=pairs)
            RowReader(format_, columns).read(row)
            if format_ in CONVERSATIONS:
                RowReader(format_, columns, train_on="marked").read(row)
        except StepFailure as failure:
            if failure.exit_code is not _DATASET or not failure.message.startswith(row.location):
                raise AssertionError(f"{failure.exit_code!r}: {failure.message}") from failure


def _family(path: Path) -> None:
    assert inspect_family(path.parent, LoraSpec()).target_modules


@cache
def _model() -> Decoder:
    """A model without weights, to go with the files' weights."""
    with torch.device("meta"):
        model: Decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(_LLAMA)))
    return model


def _weights(path: Path) -> None:
    require_whole(path, path.name)
    BaseWeights(path.parent, _model())


def _stored_layer(content: bytes, _folder: Path) -> None:
    tensor = torch.tensor(list(content), dtype=torch.uint8)
    _LAYER.require_header("U8", tuple(tensor.shape))
    assert json.loads(bytes(_LAYER.ours(tensor).tolist())) == json.loads(_LAYER_STATE)


def _cached_model(path: Path) -> None:
    (path.parent / "config.json").write_bytes(b"{}")
    assert manifest_of(path.parent).files["config.json"].size == 2


def _base_manifest(path: Path) -> None:
    (path.parent / "model.safetensors").write_bytes(b"{}")
    require_sha256(path.parent, "0" * 64)


def _checkpoint(name: str, *seeds: bytes) -> Target:
    """Return a target that reads a checkpoint with this file and matching digests."""

    def read(content: bytes, folder: Path) -> None:
        place = folder / "step-2"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        state = content if name == "state.json" else _STATE
        (place / "state.json").write_bytes(state)
        (place / "manifest.json").write_bytes(dumped({"sha256": {"state.json": sha256(state).hexdigest()}}))
        (place / name).write_bytes(content)
        assert read_checkpoint(place).step == 2 or name == "state.json"

    return Target(read, seeds, (ValueError,))


def _completions(path: Path) -> None:
    again = path.with_name("again.json")
    for kind in map(type, _RECORDS):
        record = read_completion(path, kind)
        if record is not None:
            try:
                write_completion(again, record)
            except ValueError:  # an infinite loss, which training does not write
                continue
            assert read_completion(again, kind) == record


def _attempts(path: Path) -> None:
    attempts = read_attempts(path.parent)
    write_attempts(path.parent, attempts)
    assert read_attempts(path.parent) == attempts


def _history(path: Path) -> None:
    try:
        curve = read_history(path).loss
    except ValueError as error:
        if not str(error).startswith(f"{path}:"):
            raise AssertionError("the message does not say where") from error
        raise
    assert len(curve.steps) == len(curve.values)


def _samples(path: Path) -> None:
    samples = read_samples(path)
    assert samples.samples or samples.missing is not None


def _statistics(path: Path) -> None:
    found = DataStatistics.read(path.parent)
    found.write(path.parent)
    assert DataStatistics.read(path.parent) == found


def _chunk(path: Path) -> None:
    chunk = Chunk.read(path, Limits(vocabulary=8, longest=4))
    if chunk is not None and len(chunk.lengths):
        rows = TokenizedRows([chunk])
        found = rows.input_ids(numpy.arange(len(rows)))
        assert len(found) == rows.lengths.sum()
        assert all(0 <= token < 8 for token in found)


def _split(path: Path) -> None:
    assert PreparedDataset(path).rows >= 0


def _seed_chunk() -> bytes:
    row = TokenizedRow(numpy.array([1, 7, 2], numpy.int32), numpy.array([False, True, True]))
    with TemporaryDirectory() as folder:
        path = Path(folder, "chunk.safetensors")
        Chunk.from_rows([row, row]).write(path)
        return path.read_bytes()


def _seed_split() -> bytes:
    offsets = {"token_offsets": numpy.array([0, 2]), "segment_offsets": numpy.array([0, 1])}
    rows = {"input_ids": numpy.array([1, 2], numpy.int32), "segment_lengths": numpy.array([2], numpy.int32)}
    tensors = {**offsets, **rows, "is_target": numpy.array([0, 1], numpy.uint8)}
    return save(tensors, metadata={"prepared": json.dumps({"format": 2, "targetTokens": 1})})


FILES: dict[str, Target] = {
    # A process is forked for each Parquet file: `test_data_properties.py` damages a few.
    **{ending.removeprefix("."): _data(ending) for ending in GOOD_FILES if ending != ".parquet"},
    "formats": _data(".jsonl", _LINES),
    "family": Target(
        in_file("config.json", _family),
        (_LLAMA, dumped(json.loads(_LLAMA) | _QUANTIZED)),
        exit_codes=(_CONFIGURATION, _UNSAFE, _UNAVAILABLE),
    ),
    "weights": Target(in_file("model.safetensors", _weights), (_seed_chunk(),), exit_codes=(_UNAVAILABLE,)),
    "stored-layer": Target(_stored_layer, (_LAYER_STATE,), rejections=(ValueError,)),
    "indexed-weights": Target(
        in_file("indexed/model.safetensors.index.json", lambda path: BaseWeights(path.parent, _model())),
        (b'{"weight_map": {"a": "model-1.safetensors"}}',),
        exit_codes=(_UNAVAILABLE, _UNSAFE),
    ),
    "cached-model": Target(in_file(f"cached/{BASE_MANIFEST}", _cached_model), (_CACHED,), (DamagedCacheError,)),
    "base-manifest": Target(in_file(f"base/{BASE_MANIFEST}", _base_manifest), (_BASE,), exit_codes=(_UNSAFE,)),
    "checkpoint-manifest": _checkpoint(
        "manifest.json",
        dumped({"sha256": {"state.json": sha256(_STATE).hexdigest()}}),
        b'{"sha256": {"/dev/zero": "0"}}',
    ),
    "checkpoint-state": _checkpoint("state.json", _STATE),
    "completion": Target(in_file("prepare.json", _completions), tuple(dumped(record.dump()) for record in _RECORDS)),
    "attempts": Target(in_file(ATTEMPTS_FILE, _attempts), (2 * _ATTEMPT,)),
    "history": Target(in_file("metrics.jsonl", _history), (_METRICS,), (ValueError,)),
    "samples": Target(in_file("samples.json", _samples), (_SAMPLES,)),
    "statistics": Target(in_file(STATISTICS, _statistics), (_STATISTICS,), (ValueError,)),
    "chunk": Target(in_file("chunk.safetensors", _chunk), (_seed_chunk(),)),
    "split": Target(in_file("train.safetensors", _split), (_seed_split(),), (ValueError,)),
}
