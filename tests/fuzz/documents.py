"""Parsers of addresses, manifests, settings, records and logs."""

import json
from pathlib import Path

from qlora_api.contract import ExitCode, ProgressRecord, decode_record, encode_record
from qlora_api.figures import with_progress
from qlora_api.sources import ObjectStoreSource, RegistrySource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import QLoRAJobStatus
from qlora_cli.manifest import ManifestError, load_manifest
from qlora_operator.decisions.observed.objects import Pod
from qlora_operator.reconcile.progress import latest_record
from qlora_operator.settings import SettingsError, load_settings
from qlora_trainer.data.read.hub_splits import EVALUATION, TRAINING, choose_data_files, read_dataset_card
from qlora_trainer.model.memory.fit import read_shape
from qlora_trainer.model.source.files import reject_code, weight_files
from qlora_trainer.stores.contents import parse_manifest
from qlora_trainer.stores.model_pack import pack, unpack
from qlora_trainer.stores.registry import parse_layers
from tests.fuzz.target import Target
from tests.support.builders import (
    DATASET,
    MODEL,
    NAME,
    NOW,
    UID,
    child,
    ended,
    failed,
    follow,
    make_job,
    pod,
    progress,
    status_in,
    succeeded,
)
from tests.support.sweeps import SWEEP

POD = Pod(name="pod", uid=f"uid-{NAME}-train-1-pod1", owner_uid="", created=NOW, phase="Running")

_DOCUMENT = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAJob",
    "metadata": {"name": "tune"},
    "spec": {
        "model": MODEL | {"revision": "main"},
        "dataset": DATASET | {"format": "chat", "columns": {"messages": "turns"}},
        "lora": {"rank": 16, "targetModules": ["all-linear"], "layersToTransform": [0, 1]},
        "training": {"learningRate": 2e-4, "epochs": 1, "packing": True, "optimizer": "paged_adamw_8bit"},
        "output": {"destination": "pvc://claim/folder"},
    },
}
_CONFIG = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
_PUBLISHED = {
    "jobUid": UID,
    "jobName": NAME,
    "fingerprint": "f",
    "specSha256": "0" * 64,
    "baseModel": "hf://org/model",
    "baseRevision": "c0ffee",
    "libraries": {"torch": "2.15.0"},
    "files": {"adapter_model.safetensors": {"sha256": "0" * 64, "size": 7}},
}
_MANIFEST = f"""\
# A job.
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {{name: tune, labels: &labels {{team: "a"}}, annotations: {{<<: *labels}}}}
spec:
  model:
    source: {MODEL["source"]}
  dataset: {json.dumps(DATASET)}
  training: {{learningRate: 2e-4, epochs: 1}}
"""
_SETTINGS = b"""\
namespaces: [team]
resyncSeconds: 300
profiles:
  default:
    image: example.org/trainer
    gpuResource: nvidia.com/gpu
    nodeSelector: {pool: gpu}
    tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]
    registries: ["http://registry.example:5000"]
"""
_CARD = b"""\
---
configs:
- config_name: en
  default: true
  data_files: [{split: train, path: "en/**"}, {split: test, path: ["en/*.csv", "?"]}]
- {config_name: de, data_dir: de}
---
"""
_DATA_NAMES = ("en/train/a.csv", "en/b.csv", "de/test.csv", "README.md", "train-0.jsonl")


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _text(content: bytes) -> str:
    return content.decode(errors="surrogatepass") if content.isascii() else content.decode(errors="replace")


def _written(content: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _source(content: bytes, _folder: Path) -> None:
    source = parse_source(_text(content))
    if isinstance(source, (VolumeSource, ObjectStoreSource, RegistrySource)):
        assert parse_source(str(source)) == source
    assert ".." not in str(source).split("/")


def _record(content: bytes, _folder: Path) -> None:
    record = decode_record(_text(content), job_uid=UID, pod_uid=POD.uid)
    if record is None:
        return
    try:
        line = encode_record(record)
    except ValueError:  # larger than its kind may be
        return
    assert decode_record(line, job_uid=UID, pod_uid=POD.uid) == record


def _log(content: bytes, _folder: Path) -> None:
    found = latest_record(_text(content), UID, POD, "train")
    assert found is None or isinstance(found, ProgressRecord)
    if found is not None:
        _require_storable(with_progress(QLoRAJobStatus(), found))


def _termination(content: bytes, _folder: Path) -> None:
    job, message = make_job(status_in("train")), _text(content)
    for code in (0, 14, 143, 203):
        _require_storable(follow(job, child("train", Complete=""), ended(pod("train"), code, message)))


def _require_storable(status: QLoRAJobStatus) -> None:
    """The API server must accept it, and no part controls a reader's terminal."""
    assert QLoRAJobStatus.model_validate(status.dump()) == status
    assert all(condition.message.isprintable() for condition in status.conditions)
    assert status.last_failure is None or status.last_failure.message.isprintable()


def _document(content: bytes, _folder: Path) -> None:
    document = QLoRAJobDocument.model_validate_json(content)
    assert QLoRAJobDocument.model_validate(document.dump()) == document


def _manifest(content: bytes, folder: Path) -> None:
    try:
        load_manifest(_written(content, folder, "job.yaml"))
    except ManifestError as error:
        lines = str(error).split("\n")
        assert all(line.isprintable() and line.startswith(str(folder)) for line in lines)
        raise


def _settings(content: bytes, folder: Path) -> None:
    assert load_settings(_written(content, folder, "settings.yaml")).profiles


def _shape(content: bytes, folder: Path) -> None:
    shape = read_shape(_written(content, folder, "config.json"))
    assert shape is None or shape.linear_parameters > 0


def _published(content: bytes, _folder: Path) -> None:
    manifest = parse_manifest(content)
    assert manifest is None or parse_manifest(manifest.text()) == manifest


def _artifact(content: bytes, _folder: Path) -> None:
    manifest = parse_layers(content)
    for blob in unpack(manifest).values() if manifest is not None else ():
        assert blob.size >= 0
        assert len(blob.digest) == len("sha256:") + 64


def _card(content: bytes, folder: Path) -> None:
    card = read_dataset_card(_written(content, folder, "README.md"), "hf://a/b")
    for wanted in (TRAINING, EVALUATION):
        assert set(choose_data_files(_DATA_NAMES, card, "", wanted, "hf://a/b")) <= set(_DATA_NAMES)


def _index(content: bytes, _folder: Path) -> None:
    names = ("model-1.safetensors", "model-2.safetensors", "tokenizer.json")
    assert set(weight_files(content, names, "hf://a/b")) <= set(names)


def _tokenizer(content: bytes, folder: Path) -> None:
    _written(content, folder, "tokenizer_config.json")
    reject_code(folder)


def _packed() -> bytes:
    manifest = parse_manifest(_json(_PUBLISHED))
    assert manifest is not None
    return pack("adapter", manifest.files)[1]


def _message(body: dict[str, object]) -> bytes:
    status = body["status"]
    assert isinstance(status, dict)
    return str(status["containerStatuses"][0]["state"]["terminated"]["message"]).encode()


_PROGRESS = encode_record(
    progress(training_step=3, total_steps=9, epoch=0.5, loss=1.5, remaining_seconds=60, checkpoint_step=2)
).encode()
_RESULTS = (_message(succeeded("train")), _message(failed("train", 14, "Diverged", "the loss is not finite")))

DOCUMENTS: dict[str, Target] = {
    "source": Target(
        _source,
        (
            b"hf://org/name/data/a.jsonl",
            b"pvc://claim/a/b",
            b"s3://bucket/a/b",
            b"configMap://name/key.jsonl",
            b"oci://registry.example:5000/a/b:tag@sha256:" + b"0" * 64,
        ),
        (ValueError,),
    ),
    "record": Target(_record, (_PROGRESS, *_RESULTS)),
    "log": Target(_log, (b"noise\n" + _PROGRESS + b"\nTraceback", _PROGRESS + b"\n" + _RESULTS[0])),
    "termination": Target(_termination, (*_RESULTS, b"panic: \x1b[31mred\n")),
    "document": Target(_document, (_json(_DOCUMENT),), (ValueError,)),
    "manifest": Target(_manifest, (_MANIFEST.encode(), _json(_DOCUMENT), _json(SWEEP)), (ManifestError,)),
    "settings": Target(_settings, (_SETTINGS,), (SettingsError,)),
    "shape": Target(
        _shape, (_json(_CONFIG), _json({"text_config": _CONFIG})), exit_codes=(ExitCode.BAD_CONFIGURATION,)
    ),
    "published": Target(_published, (_json(_PUBLISHED),)),
    "artifact": Target(_artifact, (_packed(),), (ValueError,)),
    "card": Target(_card, (_CARD,), exit_codes=(ExitCode.BAD_DATASET,)),
    "index": Target(
        _index,
        (_json({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}),),
        exit_codes=(ExitCode.UNSAFE_ARTIFACT, ExitCode.MODEL_UNAVAILABLE),
    ),
    "tokenizer": Target(
        _tokenizer,
        (_json({"tokenizer_class": "LlamaTokenizer", "auto_map": None}),),
        exit_codes=(ExitCode.UNSAFE_ARTIFACT, ExitCode.MODEL_UNAVAILABLE),
    ),
}
