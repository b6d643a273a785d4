"""QLoRAClient with a real API server: jobs are stored, followed and deleted."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ProgressRecord, decode_any_record
from qlora_api.schema import replace
from qlora_api.spec.dataset import DatasetSpec, EvalSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.training import LoraSpec
from qlora_client import ClusterBackendConfig, QLoRAClient, QLoRAJob, Row
from tests.support.cluster.reported import Reported, progress, reported

ROOT = Path(__file__).parents[3]
SPEC = QLoRAJobSpec(
    model=BaseModelSpec(source="hf://org/Tiny.Model"),
    dataset=DatasetSpec(source="hf://org/rows"),
    lora=LoraSpec(rank=8),
)


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), "programs") as team:
        yield team


@pytest.fixture
def client(team: Reported) -> QLoRAClient:
    return QLoRAClient(ClusterBackendConfig(namespace=team.namespace, config_file=team.plane.kubeconfig))


def test_a_job_is_stored_with_its_set_fields_and_read_with_the_defaults(team: Reported, client: QLoRAClient) -> None:
    name = client.train(SPEC, labels={"team": "search"}, annotations={"why": "a test"})
    assert re.fullmatch(r"tiny-model-[0-9a-f]{6}", name)
    stored = team.stored(name)
    assert stored["metadata"]["labels"] == {"team": "search"}
    assert stored["metadata"]["annotations"] == {"why": "a test"}
    job = client.get_job(name)
    assert (job.name, job.namespace, job.phase, job.ended) == (name, team.namespace, "Pending", False)
    # The server fills in the same defaults that the models have.
    assert job.spec == SPEC
    assert job in client.list_jobs()
    client.delete_job(name)
    with pytest.raises(RuntimeError, match="not found in the namespace programs"):
        client.get_job(name)


def test_a_rejection_by_the_server_is_a_runtime_error_with_its_message(client: QLoRAClient) -> None:
    client.train(SPEC, name="twice")
    with pytest.raises(RuntimeError, match='"twice" already exists'):
        client.train(SPEC, name="twice")
    with pytest.raises(RuntimeError, match="twice is Pending and has published no adapter"):
        client.get_adapter("twice")


def test_logs_are_followed_from_before_the_pod_starts_to_the_end_of_the_job(
    team: Reported, client: QLoRAClient
) -> None:
    client.train(SPEC, name="followed")
    job = team.stored("followed")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(client.get_job_logs("followed", "train", follow=True)))
    reader.start()
    team.pod(job, "followed-train-1", "train")
    team.wait("followed-train-1", "ContainerCreating", "")
    log = team.kubelet.logs["followed-train-1"]
    log.add("begins", progress(job, team.pod_uid("followed-train-1"), 50, 2.0))
    team.start("followed-train-1")
    log.add(progress(job, team.pod_uid("followed-train-1"), 100, 1.5))
    team.end("followed-train-1")
    team.event("followed", "Trained", "100 steps are done")
    team.report("followed", "Succeeded", "the adapter is published", progress={"step": 100, "totalSteps": 100})
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert read[0] == "begins"
    losses = [record.loss for record in map(decode_any_record, read[1:]) if isinstance(record, ProgressRecord)]
    assert losses == [2.0, 1.5]
    assert [(event.reason, event.message) for event in client.get_job_events("followed")] == [
        ("Trained", "100 steps are done")
    ]
    assert list(client.get_job_logs("followed", "prepare")) == []
    assert client.compare("followed").histories["followed"].training == {50: 2.0, 100: 1.5}


def test_waiting_follows_a_job_to_its_end(team: Reported, client: QLoRAClient) -> None:
    client.train(SPEC, name="awaited")
    phases = iter(["Preparing", "Training", "Succeeded"])
    seen: list[str] = []

    def go_on(job: QLoRAJob) -> None:
        seen.append(job.phase)
        team.report("awaited", next(phases), progress={"step": 3, "totalSteps": 9, "percent": 33})

    ended = client.wait_for_job_status("awaited", {"Training"}, polling_interval=0.1, callbacks=[go_on])
    assert ended.status.progress is not None
    assert ended.status.progress.percent == 33
    assert seen == ["Pending", "Preparing", "Training"]
    team.report("awaited", "Failed", "DoesNotFit: 24 GiB are too few")
    with pytest.raises(RuntimeError, match="awaited has ended as Failed: DoesNotFit: 24 GiB are too few"):
        client.wait_for_job_status("awaited")


def test_a_sweep_is_stored_and_its_cells_are_compared(client: QLoRAClient) -> None:
    template = replace(SPEC, dataset=DatasetSpec(source="hf://org/rows", eval=EvalSpec(fraction=0.1)))
    client.sweep(template, "rates", learning_rate=[1e-4, 2e-4], rank=[16, 64], parallelism=2)
    sweep = client.get_sweep("rates")
    stored = sweep.get()
    assert stored.spec.template.spec == template
    assert [each.text() for each in stored.spec.overrides()][:2] == [
        "rank=16 learningRate=0.0001",
        "rank=16 learningRate=0.0002",
    ]
    assert (stored.phase, stored.spec.parallelism) == ("Pending", 2)
    with pytest.raises(RuntimeError, match="rates has no cells yet: it is Pending"):
        sweep.compare()
    for number, rank in enumerate((16, 64)):
        cell = replace(SPEC, lora=LoraSpec(rank=rank))
        client.train(cell, name=f"rates-0{number}", labels={"qlora.dev/sweep": "rates"})
    assert sweep.compare().settings == (Row("lora.rank", ("16", "64")),)
    with pytest.raises(RuntimeError, match='"rates" already exists'):
        client.sweep(template, "rates", rank=[8, 16])
    with pytest.raises(RuntimeError, match="not found in the namespace programs"):
        client.get_sweep("gone")


_BESIDE_KUBEFLOW = """
import sys
from importlib.metadata import version
from kubeflow.trainer import TrainerClient
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_client import ClusterBackendConfig, QLoRAClient
assert int(version("kubernetes").partition(".")[0]) < 36, version("kubernetes")
shared = set(dir(TrainerClient)) & set(dir(QLoRAClient))
ours = {"train", "get_job", "list_jobs", "get_job_logs", "get_job_events", "wait_for_job_status", "delete_job"}
assert ours <= shared, ours - shared
client = QLoRAClient(ClusterBackendConfig(namespace="programs", config_file=sys.argv[1]))
spec = QLoRAJobSpec(model=BaseModelSpec(source="hf://org/m"), dataset=DatasetSpec(source="hf://org/rows"))
name = client.train(spec)
assert client.wait_for_job_status(name, {"Pending"}).spec == spec
assert name in [job.name for job in client.list_jobs()]
assert client.get_job_events(name) == [] and list(client.get_job_logs(name)) == []
try:
    client.train(spec, name=name)
except RuntimeError as error:
    assert "already exists" in str(error), error
client.delete_job(name)
"""


@pytest.mark.slow
def test_it_works_with_kubeflows_client_and_its_older_kubernetes(team: Reported, tmp_path: Path) -> None:
    uv = next(Path(os.environ["QLORA_CACHE"]).glob("uv-*/bin/uv"))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", f"--python={sys.executable}", tmp_path / "venv"], check=True)
    wanted = [f"qlora-operator[client] @ {ROOT.as_uri()}", "kubeflow==0.5.0"]
    subprocess.run([uv, "pip", "install", "--quiet", f"--python={python}", *wanted], check=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", _BESIDE_KUBEFLOW, str(team.plane.kubeconfig)],
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
