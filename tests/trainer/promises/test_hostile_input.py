"""Harmful addresses and files of jobs: links elsewhere are rejected, endless files are not read.

Other tests cover models and data sets of that kind, and the environment.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobDocument
from qlora_trainer.model.families.rejection import entries
from qlora_trainer.publishing.verify import verify_config
from qlora_trainer.stores.contents import parse_manifest
from qlora_trainer.stores.destinations.volume import VolumeFolder
from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint
from tests.support.failures import failing
from tests.support.rejected.made import write_pickle
from tests.support.rejected.parsed import ADDRESSES
from tests.support.resolved import resolved_lora
from tests.support.runs.hostile import bounded
from tests.support.runs.published import MANIFEST

NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
# Valid, and blanks to its end.
LARGE_MANIFEST = MANIFEST.text() + b" " * 2**23


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", ["model", "dataset", "destination"])
def test_an_address_that_means_another_place_is_rejected_by_the_schema(field: str, address: str) -> None:
    spec: dict[str, Any] = {"model": {"source": "hf://org/name"}, "dataset": {"source": "hf://org/rows"}}
    if field == "destination":
        spec["output"] = {"destination": address}
    else:
        spec[field] = {"source": address}
    document = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": "a"}, "spec": spec}
    with pytest.raises(ValidationError):
        QLoRAJobDocument.model_validate(document)


def test_a_checkpoint_that_names_files_elsewhere_is_set_aside(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"sha256": {"../../outside/secret": "0", "state.json": "0"}}')
    (checkpoint / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert checkpoint.with_name("step-2.corrupt").is_dir()


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    write_pickle(tmp_path / "canary", checkpoint / "optimizer.pt")
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


@pytest.mark.parametrize("make", [_endless, os.mkfifo, Path.mkdir])
def test_an_endless_adapter_configuration_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "adapter_config.json")
    with bounded(), failing(ExitCode.UNSAFE_ARTIFACT, "not a regular file"):
        verify_config(
            tmp_path / "adapter_config.json",
            resolved_lora(),
            target_modules=(),
            whole_modules=(),
            base_name="hf://a/b",
            base_revision="c0",
        )


def test_keys_of_a_configuration_are_found_at_any_depth() -> None:
    value: Any = {"auto_map": 1, "z": 2}
    for _ in range(50_000):
        value = {"a": [value]}
    assert [key for key, _ in entries(value)] == ["a"] * 50_000 + ["auto_map", "z"]
