"""Harmful addresses and files of jobs: links elsewhere are rejected, endless files are not read.

Other tests cover models and data sets of that kind, and the environment.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.families.rejection import entries
from qlora_trainer.publishing.verify import verify_config
from qlora_trainer.stores.contents import parse_manifest
from qlora_trainer.stores.destinations.volume import VolumeFolder
from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint
from tests.support.runs.hostile import Payload, bounded
from tests.support.runs.published import MANIFEST

NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
# Valid, and blanks to its end.
LARGE_MANIFEST = MANIFEST.text() + b" " * 2**23

ADDRESSES = [
    "hf://../../etc",
    "hf://org/..",
    "hf://org/name@evil.example",
    "hf://user:password@evil.example/name",
    "hf://org/name?token=x",
    "hf://org/name#x",
    "hf://org/na%2e%2eme/%2e%2e",
    "hf://org/name\n",
    "hf://org/name\x00",
    "hf://оrg/name",  # the first letter is Cyrillic
    "http://169.254.169.254/latest/meta-data",
    "https://huggingface.co/org/name",
    "file:///etc/passwd",
    "/etc/passwd",
    "../model",
    "pvc://claim/../../etc",
    "pvc://claim/.git/config",
    "pvc://../claim",
    "pvc://claim//etc",
    "s3://bucket/../other",
    "s3://user:key@bucket/path",
    "s3://bucket@evil.example/path",
    "oci://user:password@registry.example/name:tag",
    "oci://registry.example/../name:tag",
    "oci://registry.example/name:tag@evil.example",
    "HF://org/name",
    "hf:org/name",
    " hf://org/name",
    "hf://" + "a" * 600 + "/name",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", ["model", "dataset", "destination"])
def test_an_address_that_means_another_place_is_rejected_by_the_schema(field: str, address: str) -> None:
    spec: dict[str, Any] = {"model": {"source": "hf://org/name"}, "dataset": {"source": "hf://org/rows"}}
    if field == "destination":
        spec["output"] = {"destination": address}
    else:
        spec[field] = {"source": address}
    document = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "a"}, "spec": spec}
    with pytest.raises(ValidationError):
        QLoRAJobDocument.model_validate(document)


@pytest.mark.parametrize("name", ["../../outside/secret", "/etc/passwd", "adapter.safetensors/../../x"])
def test_a_checkpoint_that_names_files_elsewhere_is_set_aside(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": {name: "0" * 64, "state.json": "0" * 64}}))
    (checkpoint / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert checkpoint.with_name("step-2.corrupt").is_dir()


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [NESTED, b"[" * 100_000, b'{"jobUid": ' + NESTED + b"}"])
def test_an_endlessly_nested_manifest_is_ignored(content: bytes) -> None:
    assert parse_manifest(content) is None


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _gigabytes(path: Path) -> None:
    path.write_bytes(MANIFEST.text())
    os.truncate(path, 2**33)


def _large(path: Path) -> None:
    path.write_bytes(LARGE_MANIFEST)


@pytest.mark.parametrize("make", [_endless, _gigabytes, _large, os.mkfifo, Path.mkdir])
def test_an_endless_manifest_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Any process that can write to the volume can put it where a job publishes."""
    make(tmp_path / "manifest.json")
    destination = VolumeFolder(tmp_path, "pvc://claim/folder", owner="pod")
    with bounded():
        assert destination.read_manifest() is None
    assert not destination.is_free()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "is not a JSON object"),
        (b"1", "is not a JSON object"),
        (NESTED, "is not JSON"),
        (b'{"peft_type": ' + b"[" * 400 + b"]" * 400 + b"}", "has peft_type: [[["),
        (b'{"peft_type": "' + b"a" * 2**23 + b'"}', "is not JSON of less than"),
    ],
)
def test_an_invalid_adapter_configuration_is_reported(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    failure = _rejected_configuration(tmp_path / "adapter_config.json")
    assert f"adapter_config.json {says}" in failure.message
    assert failure.exit_code is ExitCode.INTERNAL_ERROR


@pytest.mark.parametrize("make", [_endless, os.mkfifo, Path.mkdir])
def test_an_endless_adapter_configuration_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "adapter_config.json")
    with bounded():
        failure = _rejected_configuration(tmp_path / "adapter_config.json")
    assert "not a regular file" in failure.message
    assert failure.exit_code is ExitCode.UNSAFE_ARTIFACT


def _rejected_configuration(path: Path) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        verify_config(path, LoraSpec(), target_modules=(), whole_modules=(), base_name="hf://a/b", base_revision="c0")
    return failure.value


def test_keys_of_a_configuration_are_found_at_any_depth() -> None:
    value: Any = {"auto_map": 1, "z": 2}
    for _ in range(50_000):
        value = {"a": [value]}
    assert [key for key, _ in entries(value)] == ["a"] * 50_000 + ["auto_map", "z"]
