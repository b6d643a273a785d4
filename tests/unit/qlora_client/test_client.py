"""A program's view of its jobs through QLoRAClient: values, waits, plans, and errors."""

import importlib.util
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qlora_api.schema import replace
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.training import LoraSpec, ResourcesSpec, TrainingSpec
from qlora_client import ClusterBackendConfig, Comparison, QLoRAClient, QLoRAJob, Row
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import UnreachableError
from qlora_client.kube.resources import Resource
from qlora_trainer.model.source import hub_config
from tests.support.dry_runs import stand_in
from tests.support.models.model_configs import LLAMA_3_8B

Script = Callable[..., QLoRAClient]
SPEC = QLoRAJobSpec(model=BaseModelSpec(source="hf://org/model"), dataset=DatasetSpec(source="hf://org/rows"))


def job(phase: str, message: str = "", uid: str = "1", **spec: Any) -> Job:
    metadata = {"name": "demo", "namespace": "team", "uid": uid, "creationTimestamp": "2026-01-02T03:04:05Z"}
    kind = phase if phase in ("Failed", "Suspended") else "Succeeded"
    condition = {
        "type": kind,
        "status": "True",
        "reason": phase,
        "message": message,
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    return Job(
        {"metadata": metadata, "spec": SPEC.dump() | spec, "status": {"phase": phase, "conditions": [condition]}}
    )


class Scripted:
    """A cluster whose job is each time the next of these; an error is raised."""

    def __init__(self, *moments: Job | Exception) -> None:
        self.moments = iter(moments)

    def get(self, resource: Resource, name: str) -> Any:
        moment = next(self.moments)
        if isinstance(moment, Exception):
            raise moment
        return moment.body

    def find(self, resource: Resource) -> list[Any]:
        return [moment.body for moment in self.moments if isinstance(moment, Job)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterBackendConfig:
    """A cluster that cannot be reached."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{taken.getsockname()[1]}"
    kubeconfig = {
        "current-context": "away",
        "contexts": [{"name": "away", "context": {"cluster": "away", "user": "tenant", "namespace": "team"}}],
        "clusters": [{"name": "away", "cluster": {"server": server}}],
        "users": [{"name": "tenant", "user": {}}],
    }
    file = tmp_path_factory.mktemp("kube") / "config"
    file.write_text(json.dumps(kubeconfig))
    return ClusterBackendConfig(config_file=file)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scripted(cluster: ClusterBackendConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Script:
    def of(*moments: Job | Exception) -> QLoRAClient:
        client = QLoRAClient(cluster, sleep=clock.sleep, monotonic=clock.monotonic)
        monkeypatch.setattr(client, "_cluster", Scripted(*moments))
        return client

    return of


def test_waiting_ends_with_the_phase_and_reports_each_poll(scripted: Script, clock: Clock) -> None:
    away = UnreachableError("the cluster cannot be reached")
    client = scripted(job("Queued"), away, job("Training"), job("Succeeded"))
    seen: list[str] = []
    found = client.wait_for_job_status("demo", polling_interval=5, callbacks=[lambda each: seen.append(each.phase)])
    assert found.phase == "Succeeded"
    assert seen == ["Queued", "Training", "Succeeded"]
    assert clock.now == 15


def test_waiting_for_an_unreachable_phase_is_an_error(scripted: Script) -> None:
    client = scripted(job("Failed", "DoesNotFit: a larger GPU"), job("Failed"), job("Succeeded"))
    with pytest.raises(RuntimeError, match="demo has ended as Failed: DoesNotFit: a larger GPU"):
        client.wait_for_job_status("demo")
    assert client.wait_for_job_status("demo", status={"Succeeded", "Failed"}).phase == "Failed"
    with pytest.raises(RuntimeError, match="demo has ended as Succeeded"):
        client.wait_for_job_status("demo", status={"Training"})


def test_waiting_ends_at_its_timeout_and_reports_the_jobs_phase(scripted: Script, clock: Clock) -> None:
    client = scripted(*[job("Queued")] * 99)
    with pytest.raises(TimeoutError, match="demo has come to Queued in 60 s, and not to Succeeded"):
        client.wait_for_job_status("demo", timeout=60, polling_interval=7)
    assert clock.now <= 60
    client = scripted(*[UnreachableError("the cluster is away")] * 99)
    with pytest.raises(TimeoutError, match="not been seen, as the cluster is away"):
        client.wait_for_job_status("demo", timeout=10)


def test_waiting_does_not_follow_a_new_job_of_the_same_name(scripted: Script) -> None:
    client = scripted(job("Training"), job("Succeeded", uid="2"))
    with pytest.raises(RuntimeError, match="demo has been deleted, and another object has its name now"):
        client.wait_for_job_status("demo")


def test_an_error_of_a_callback_ends_the_waiting(scripted: Script) -> None:
    def fails(_job: QLoRAJob) -> None:
        raise UnreachableError("another cluster is away")

    client = scripted(*[job("Training")] * 2)
    with pytest.raises(UnreachableError, match="another cluster is away"):
        client.wait_for_job_status("demo", callbacks=[fails])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"status": {"Complete"}}, "status is {'Complete'}, must be a set of Pending, Preparing"),
        ({"status": "Succeeded"}, "status is 'Succeeded', must be a set of Pending, Preparing"),
        ({"status": set()}, "there must be a phase"),
        ({"timeout": 1, "polling_interval": 2}, "at most timeout"),
        ({"polling_interval": 0}, "more than 0"),
    ],
)
def test_waiting_rejects_arguments_that_make_no_sense(
    scripted: Script, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scripted().wait_for_job_status("demo", **arguments)


def test_fields_of_a_newer_version_are_ignored_and_values_of_it_are_reported() -> None:
    newer = QLoRAJob.of(job("Succeeded", lora={"rank": 8, "fromTheFuture": 1}))
    assert newer.spec.lora.rank == 8
    assert newer.ended
    with pytest.raises(RuntimeError, match=r"demo has a lora\.rank that this version of the client cannot read"):
        QLoRAJob.of(job("Succeeded", lora={"rank": "many"}))
    with pytest.raises(RuntimeError, match="demo has a phase that this version"):
        QLoRAJob.of(job("Archived"))


def test_a_job_that_only_a_newer_version_can_read_hides_no_other(
    scripted: Script, caplog: pytest.LogCaptureFixture
) -> None:
    client = scripted(job("Archived"), job("Training"))
    with caplog.at_level(logging.WARNING, "qlora_client"):
        assert [each.phase for each in client.list_jobs()] == ["Training"]
    assert "demo has a phase that this version of the client cannot read" in caplog.text


def test_wrong_arguments_are_value_errors(scripted: Script) -> None:
    client = scripted()
    with pytest.raises(ValueError, match="step is 'node-0', must be one of prepare, train, publish"):
        client.get_job_logs("demo", "node-0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'^metadata.name: found "rate-0.1", must be lower-case letters, digits and'):
        client.train(SPEC, name="rate-0.1")
    copied = replace(SPEC, training=replace(SPEC.training, learning_rate=2.0))
    with pytest.raises(ValueError, match=r"^spec.training.learningRate: found 2.0, must be less than or equal to 1$"):
        client.train(copied)
    with pytest.raises(ValueError, match=r"^spec.lora.rank: found \"many\", must be a whole number$"):
        client.train(SPEC.model_copy(update={"lora": LoraSpec().model_copy(update={"rank": "many"})}))
    with pytest.raises(ValueError, match=r"^spec.continues names this job itself: name the job"):
        client.train(replace(SPEC, continues="demo"), name="demo")
    with pytest.raises(ValueError, match="found no name"):
        client.compare()


def test_an_unreachable_cluster_is_a_runtime_error(cluster: ClusterBackendConfig, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the context away cannot be reached"):
        QLoRAClient(cluster).get_job("demo")
    with pytest.raises(RuntimeError, match="kubeconfig"):
        QLoRAClient(ClusterBackendConfig(config_file=tmp_path / "none"))


@pytest.mark.parametrize("name", ["", "demo/status", "demo?pretty=true", "../qlorajobs/demo", "demo%2Fstatus"])
def test_a_name_that_leads_to_another_object_is_not_sent(cluster: ClusterBackendConfig, name: str) -> None:
    client = QLoRAClient(cluster)
    for ask in (client.get_job, client.get_job_events, client.delete_job, client.compare):
        with pytest.raises(RuntimeError, match="no object of qlorajobs can have the name"):
            ask(name)


def changed(**parts: Any) -> QLoRAJobSpec:
    return SPEC.model_copy(update=parts)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_3_8B))
    return file


def test_a_plan_checks_the_gpu_and_forecasts_its_hours(
    scripted: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    client = scripted()
    fits = changed(resources=ResourcesSpec(gpu_memory="24Gi"), training=TrainingSpec(epochs=2))
    plan = client.plan(fits, config=config, gpu_tflops=312, tokens=1_000_000, gpu_hour_price="2.50 EUR")
    assert (plan.memory.verdict, plan.memory.source, plan.objection) == ("fits", "DryRun", None)
    assert plan.memory.estimate_bytes is not None
    assert plan.forecast is not None
    # Four operations for each of 8.03e9 weights and 2e6 tokens, as no activation is recomputed, at 30 % of its speed.
    hours = 4 * 8.03e9 * 2e6 / (0.3 * 312e12) / 3600
    assert float(plan.forecast.gpu_hours) == pytest.approx(hours, abs=0.01)
    assert plan.forecast.cost is not None
    assert float(plan.forecast.cost.removesuffix(" EUR")) == pytest.approx(2.5 * hours, abs=0.02)
    assert plan.wall_seconds == pytest.approx((hours * 3600 * 0.3 / 0.42, hours * 3600 * 0.3 / 0.2), rel=0.01)
    named = client.plan(fits, config=config, gpu="l4", tokens=1_000_000)
    assert named.memory.budget_bytes == int(0.98 * 23_034 * 2**20)
    assert named.forecast is not None
    assert float(named.forecast.gpu_hours) == pytest.approx(hours * 312 / 121, abs=0.01)
    with pytest.raises(ValueError, match="gpu is 't4', which has no bfloat16"):
        client.plan(fits, config=config, gpu="t4")
    tight = changed(resources=ResourcesSpec(gpu_memory="8Gi"), training=TrainingSpec(max_sequence_length=8192))
    short = client.plan(tight, config=config)
    assert "a GPU of 8 GiB" in str(short.objection)
    assert "pod memory unknown" in short.remark
    assert "pod memory" not in named.remark


def test_without_the_trainer_a_plan_has_a_forecast_and_no_memory(
    scripted: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    job = changed(resources=ResourcesSpec(gpu_memory="4Gi"), training=TrainingSpec(epochs=1))
    plan = scripted().plan(job, config=config, gpu_tflops=312, tokens=1_000_000)
    assert (plan.memory.verdict, plan.objection) == ("unknown", None)
    assert "the trainer is not installed: run `pip install '.[cli,trainer]'`" in plan.memory.message
    assert plan.forecast is not None


def test_a_plan_takes_no_cluster(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    assert QLoRAClient.plan(SPEC, config=config, gpu="l4").memory.verdict == "fits"


def test_a_plan_names_the_missing_inputs_of_a_forecast(
    scripted: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    client = scripted()
    assert client.plan(SPEC, config=config).remark == "no forecast: give the GPU with gpu, or its speed with gpu_tflops"
    assert "the rows decide on the epochs" in client.plan(SPEC, config=config, gpu_tflops=312, tokens=9).remark
    once = changed(training=TrainingSpec(epochs=1))
    assert "give the tokens of an epoch" in client.plan(once, config=config, gpu_tflops=312).remark
    steps = client.plan(changed(training=TrainingSpec(max_steps=3)), config=config, gpu_tflops=312)
    assert steps.forecast is not None
    assert "an upper bound" in steps.remark
    with pytest.raises(ValueError, match="must be a price and its currency"):
        client.plan(SPEC, config=config, gpu_hour_price="2.50")
    with pytest.raises(ValueError, match="tokens is -5, must be 1 or more"):
        client.plan(SPEC, config=config, gpu_tflops=312, tokens=-5)


def test_a_plan_without_a_network_names_the_packaged_config(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_config, "hub_answers", lambda *_: False)
    client, model = scripted(), BaseModelSpec(source="hf://Qwen/Qwen3-8B")
    spec = changed(model=model, lora=LoraSpec(rank=16), training=TrainingSpec(learning_rate=1e-4))
    plan = client.plan(spec, gpu="l4", tokens=1_000_000)
    assert plan.memory.verdict == "fits"
    assert plan.remark.endswith("config of Qwen/Qwen3-8B as packaged with this release; the Hub cannot be reached")
    with pytest.raises(RuntimeError, match=r"spec\.model\.revision is v1"):
        client.plan(changed(model=replace(model, revision="v1")))


def test_a_plan_needs_a_config_that_can_be_read(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without PyTorch no dry run begins.
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    client, config = scripted(), tmp_path / "config.json"
    for source in ("s3://bucket/model", "pvc://models/base"):
        with pytest.raises(ValueError, match=r"give the model's config\.json with config"):
            client.plan(changed(model=BaseModelSpec(source=source)))
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        client.plan(SPEC, config=config)
    config.write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        client.plan(SPEC, config=config)
    config.write_text(json.dumps(LLAMA_3_8B))
    assert client.plan(SPEC, config=config).memory.verdict == "unknown"
    with pytest.raises(ValueError, match="targetModules"):
        client.plan(changed(lora=LoraSpec(target_modules=("nothing",))), config=config)


# It starts PyTorch; for the same in the command line see tests/trainer/cli/test_plan.py.
@pytest.mark.slow
def test_a_plan_rejects_a_model_that_its_dry_run_rejects(scripted: Script, config: Path) -> None:
    config.write_text(json.dumps({**LLAMA_3_8B, "model_type": []}))
    with pytest.raises(ValueError, match="model_type"):
        scripted().plan(SPEC, config=config)


def test_a_comparison_is_a_table_without_control_characters() -> None:
    comparison = Comparison(("a", "b"), (Row("lora.rank", ("<b>8", "16")),), (Row("Phase", ("Failed", "–")),), {})
    assert str(comparison).splitlines() == ["           a       b", "lora.rank  <b>8    16", "Phase      Failed  –"]
    assert "<td>&lt;b&gt;8</td>" in comparison._repr_html_()
