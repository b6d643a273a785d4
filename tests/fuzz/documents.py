"""Parsers of addresses, manifests, settings, records and logs."""

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
from qlora_trainer.stores.endpoints import server_address
from qlora_trainer.stores.model_pack import pack, unpack
from qlora_trainer.stores.registry import parse_layers
from tests.fuzz.target import Target, dumped, in_file, in_text
from tests.support.builders import (
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
    stored_again,
    succeeded,
)
from tests.support.manifests import FULL
from tests.support.sweeps import SWEEP

POD = Pod(name="pod", uid=f"uid-{NAME}-train-1-pod1", owner_uid="", created=NOW, phase="Running")

_CONFIG = b"""\
{"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
 "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "hidden_activation": "gelu_pytorch_tanh",
 "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": true}"""
_PUBLISHED = f"""\
{{"jobUid": "{UID}", "jobName": "{NAME}", "fingerprint": "f", "specSha256": "{"0" * 64}", "baseModel": "hf://org/model",
 "baseRevision": "c0ffee", "libraries": {{"torch": "2.15.0"}},
 "files": {{"adapter_model.safetensors": {{"sha256": "{"0" * 64}", "size": 7}}}}}}""".encode()
_MANIFEST = b"""\
# A job.
apiVersion: qlora.dev/v1beta1
kind: QLoRAJob
metadata: {name: tune, labels: &labels {team: "a"}, annotations: {<<: *labels}}
spec:
  model:
    source: hf://org/model
  dataset: {"source": "hf://org/rows"}
  training: {learningRate: 2e-4, epochs: 1}
"""
_SETTINGS = b"""\
namespaces: [team]
resyncSeconds: 300
metrics: {runningJobs: 10}
dnsPorts: [53]
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
_WEIGHT_NAMES = ("model-1.safetensors", "model-2.safetensors", "tokenizer.json")
_CODE_OR_ABSENT = (ExitCode.UNSAFE_ARTIFACT, ExitCode.MODEL_UNAVAILABLE)


def _source(text: str) -> None:
    source = parse_source(text)
    if isinstance(source, (VolumeSource, ObjectStoreSource, RegistrySource)):
        assert parse_source(str(source)) == source
    assert ".." not in str(source).split("/")


def _record(text: str) -> None:
    record = decode_record(text, job_uid=UID, pod_uid=POD.uid)
    if record is None:
        return
    try:
        line = encode_record(record)
    except ValueError:  # larger than its kind may be
        return
    assert decode_record(line, job_uid=UID, pod_uid=POD.uid) == record


def _log(text: str) -> None:
    found = latest_record(text, UID, POD, "train")
    assert found is None or isinstance(found, ProgressRecord)
    if found is not None:
        _require_storable(with_progress(QLoRAJobStatus(), found))


def _termination(message: str) -> None:
    job = make_job(status_in("train"))
    for code in (0, 14, 143, 203):
        _require_storable(follow(job, child("train", Complete=""), ended(pod("train"), code, message)))


def _require_storable(status: QLoRAJobStatus) -> None:
    """The API server must accept it, and no part controls a reader's terminal."""
    assert stored_again(status) == status
    assert all(condition.message.isprintable() for condition in status.conditions)
    assert status.last_failure is None or status.last_failure.message.isprintable()


def _document(content: bytes, _folder: Path) -> None:
    document = QLoRAJobDocument.model_validate_json(content)
    assert QLoRAJobDocument.model_validate(document.dump()) == document


def _manifest(path: Path) -> None:
    try:
        load_manifest(path)
    except ManifestError as error:
        lines = str(error).split("\n")
        assert all(line.isprintable() and line.startswith(str(path.parent)) for line in lines)
        raise


def _shape(path: Path) -> None:
    shape = read_shape(path)
    assert shape is None or shape.linear_parameters > 0


def _published(content: bytes, _folder: Path) -> None:
    manifest = parse_manifest(content)
    assert manifest is None or parse_manifest(manifest.text()) == manifest


def _artifact(content: bytes, _folder: Path) -> None:
    manifest = parse_layers(content)
    for blob in unpack(manifest).values() if manifest is not None else ():
        assert blob.size >= 0
        assert len(blob.digest) == len("sha256:") + 64


def _card(path: Path) -> None:
    card = read_dataset_card(path, "hf://a/b")
    for wanted in (TRAINING, EVALUATION):
        assert set(choose_data_files(_DATA_NAMES, card, "", wanted, "hf://a/b")) <= set(_DATA_NAMES)


def _index(content: bytes, _folder: Path) -> None:
    assert set(weight_files(content, _WEIGHT_NAMES, "hf://a/b")) <= set(_WEIGHT_NAMES)


def _packed() -> bytes:
    manifest = parse_manifest(_PUBLISHED)
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
_ADDRESSES = (
    b"hf://org/name/data/a.jsonl",
    b"pvc://claim/a/b",
    b"s3://bucket/a/b",
    b"configMap://name/key.jsonl",
    b"oci://registry.example:5000/a/b:tag@sha256:" + b"0" * 64,
)

DOCUMENTS: dict[str, Target] = {
    "source": Target(in_text(_source), _ADDRESSES, (ValueError,)),
    "record": Target(in_text(_record), (_PROGRESS, *_RESULTS)),
    "log": Target(in_text(_log), (b"noise\n" + _PROGRESS + b"\nTraceback", _PROGRESS + b"\n" + _RESULTS[0])),
    "termination": Target(in_text(_termination), (*_RESULTS, b"panic: \x1b[31mred\n")),
    "document": Target(_document, (dumped(FULL),), (ValueError,)),
    "manifest": Target(in_file("job.yaml", _manifest), (_MANIFEST, dumped(FULL), dumped(SWEEP)), (ManifestError,)),
    "settings": Target(in_file("settings.yaml", load_settings), (_SETTINGS,), (SettingsError,)),
    "shape": Target(
        in_file("config.json", _shape),
        (_CONFIG, b'{"text_config": ' + _CONFIG + b"}"),
        exit_codes=(ExitCode.BAD_CONFIGURATION,),
    ),
    "published": Target(_published, (_PUBLISHED,)),
    "artifact": Target(_artifact, (_packed(),), (ValueError,)),
    "card": Target(in_file("README.md", _card), (_CARD,), exit_codes=(ExitCode.BAD_DATASET,)),
    "index": Target(
        _index,
        (b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',),
        exit_codes=_CODE_OR_ABSENT,
    ),
    "server": Target(
        in_text(lambda text: server_address({"AWS_ENDPOINT_URL": text}, "AWS_ENDPOINT_URL")),
        (b"https://minio.team.svc:9000", b"http://[::1]:80/path"),
        exit_codes=(ExitCode.BAD_CONFIGURATION,),
    ),
    "tokenizer": Target(
        in_file("tokenizer_config.json", lambda path: reject_code(path.parent)),
        (b'{"tokenizer_class": "LlamaTokenizer", "auto_map": null}',),
        exit_codes=_CODE_OR_ABSENT,
    ),
}
