"""Jobs on this machine: how one that cannot start ends, and what is left of one that is deleted."""

from pathlib import Path

import pytest

from qlora_api.dataset import DatasetSpec
from qlora_api.model_and_output import BaseModelSpec
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_client import LocalBackendConfig, QLoRAClient

SPEC = QLoRAJobSpec(model=BaseModelSpec(source="pvc://models/base"), dataset=DatasetSpec(source="pvc://data/a.jsonl"))


def test_a_run_that_cannot_start_has_failed_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path / "runs", volumes={"data": tmp_path / "data"}))
    name = client.train(SPEC, name="lost")
    with pytest.raises(RuntimeError, match="give a folder for the claim with --volume models=DIR"):
        client.wait_for_job_status(name, timeout=60, polling_interval=0.1)
    lines = list(client.get_job_logs(name, follow=True))
    assert lines[-1].startswith("Error: spec.model.source is pvc://models/base")
    with pytest.raises(RuntimeError, match=r"lost is Failed and has published no adapter: Error: spec\.model\.source"):
        client.get_adapter(name, tmp_path / "adapter")
    assert client.compare(name).histories[name].training == {}


def test_a_name_is_taken_as_long_as_its_folder_is_there(tmp_path: Path) -> None:
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path))
    client.train(SPEC, name="taken")
    client.wait_for_job_status("taken", {"Failed"}, timeout=60, polling_interval=0.1)
    client.delete_job("taken")
    assert client.list_jobs() == []
    with pytest.raises(RuntimeError, match="taken exists already: choose another name, or remove the folder"):
        client.train(SPEC, name="taken")
