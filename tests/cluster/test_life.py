"""The tests of `make test` in real pods: a life of a job, an interruption, bad input, and a sweep.

The life is shown as its user sees it, from `kubectl apply` to an adapter that plain PEFT loads. The others begin before
it and run with it, as pods mostly wait for the node. All other tests of this folder belong to `make test-cluster`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from devcluster.product import SHARED_PROFILE
from examples.demo import __main__ as demo
from qlora_api.naming import SWEEP_LABEL
from tests.cluster.conftest import row
from tests.cluster.environment import CHECKPOINT, INPUTS, LONG, Object, Tenant, tiny_job, tiny_sweep
from tests.support.commands.typed import typed
from tests.support.waiting import eventually

NAME, INTERRUPTED, BAD, SWEEP = "life", "interrupted", "bad", "packed"


@dataclass(frozen=True)
class Finished:
    """A job that has run to its end under `qlora watch`."""

    status: Object
    seen: list[list[str]]
    """The job's lines of `kubectl get qlorajobs --watch`, as words."""
    watched: str
    """What `qlora watch` showed in a terminal."""
    logs: str
    """What `qlora logs --follow` printed."""


@pytest.fixture(scope="module")
def deleted(tenant: Tenant) -> Object:
    """Begin the job to interrupt, then the others; return its deleted train pod."""
    tenant.apply(tiny_job(INTERRUPTED, steps=LONG))
    good = json.dumps(row(0))
    tenant.kubectl("create", "configmap", BAD, f"--from-literal=cut.jsonl={good}\n{good[:40]}")
    tenant.apply(tiny_job(BAD, dataset={"source": f"configMap://{BAD}/cut.jsonl"}))
    tenant.claim(SWEEP)
    sweep = tiny_sweep(SWEEP, cellsPerPod=2)
    sweep["spec"]["template"]["spec"] |= {
        "lora": {"rank": 4, "alpha": 8},
        "workspace": {"claimName": SWEEP},
        "scheduling": {"profileName": SHARED_PROFILE},
    }
    tenant.apply(sweep)
    return tenant.held_until_asked(INTERRUPTED, tenant.delete_pod)


@pytest.fixture(scope="module")
def finished(tenant: Tenant, deleted: Object, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    assert deleted
    output = tmp_path_factory.mktemp("watch") / "lines"
    kubectl = tenant.cluster.kubectl
    namespace = f"--namespace={tenant.namespace}"
    get: list[str | Path] = [kubectl.program, "--kubeconfig", kubectl.kubeconfig, namespace, "get", "qlorajobs"]
    tenant.kubectl("create", "secret", "generic", "hub", "--from-literal=token=unused")
    model = {"source": f"pvc://{INPUTS}/model", "tokenSecretRef": {"name": "hub"}}
    tenant.apply(tiny_job(NAME, steps=LONG, model=model))
    with output.open("w") as file:
        watch = subprocess.Popen([*get, "--watch", "--no-headers"], stdout=file)
        options = ("--kubeconfig", str(kubectl.kubeconfig), namespace)
        try:
            with (
                typed("watch", NAME, *options, terminal=True) as watched,
                typed("logs", NAME, "--follow", *options, terminal=False) as logs,
            ):
                for count, at in enumerate((CHECKPOINT, rf'"checkpointStep": ?{LONG // 2}\b'), 1):
                    with tenant.held(NAME, at):
                        eventually(partial(shows_progress, output, count), what=f"a row of {at}")
                status = tenant.succeed(NAME)
                tenant.kubectl("wait", f"qlorajob/{NAME}", "--for=condition=Succeeded", "--timeout=10s")
                assert (watched.end(), logs.end()) == (0, 0)
                eventually(lambda: "Succeeded" in rows(output)[-1], seconds=60, what="the row of the end")
        finally:
            watch.terminate()
            watch.wait()
    return Finished(status, rows(output), watched.shown, logs.shown)


def rows(watch: Path) -> list[list[str]]:
    """The words of each row about the job; the watch has the others' too."""
    found = [line.split() for line in watch.read_text().splitlines()]
    return [words for words in found if words[:1] == [NAME]]


def training_rows(seen: list[list[str]]) -> list[list[str]]:
    return [words for words in seen if words[1:2] == ["Training"] and len(words) == 8]


def shows_progress(watch: Path, count: int) -> bool:
    """Whether the watch has shown so many different percentages."""
    return len({words[2] for words in training_rows(rows(watch))}) >= count


def test_the_watch_shows_every_phase_and_progress(finished: Finished) -> None:
    phases = list(dict.fromkeys(words[1] for words in finished.seen if len(words) > 2))
    # Pods of the others may keep each of its pods waiting.
    order = ["Preparing", "Training", "Publishing", "Succeeded"]
    assert [phase for phase in phases if phase in order] == order
    training = training_rows(finished.seen)
    assert len({words[2] for words in training}) >= 2, f"the percentage never moved: {finished.seen}"
    assert all(words[2].endswith("%") and words[3].endswith(f"/{LONG}") for words in training)
    assert all(float(words[4]) > 0 for words in training)
    assert len({words[5] for words in training}) >= 2, f"the time left never moved: {finished.seen}"


def test_the_command_line_shows_the_same_life(finished: Finished) -> None:
    assert re.search(rf"\d+% \d+/{LONG}, loss [\d.]+", finished.watched)
    assert f"{NAME} has succeeded: {finished.status['adapter']['uri']}" in finished.watched
    for step in ("prepare", "train", "publish"):
        assert len(re.findall(rf"^\d\d:\d\d:\d\d {step} succeeded: ", finished.logs, re.MULTILINE)) == 1
    assert re.search(rf"train: \S+ \d+/{LONG}, loss [\d.]+", finished.logs)


def test_the_status_has_data_memory_progress_and_checkpoint(finished: Finished) -> None:
    status = finished.status
    assert status["dataset"]["rows"] == 64
    assert status["dataset"]["usedRows"] == 64
    assert status["dataset"]["evalRows"] == 8
    assert status["dataset"]["format"] == "chat"
    assert status["memory"]["verdict"] == "unknown"
    assert status["memory"]["peakBytes"] > 0
    assert status["progress"]["summary"] == f"100% {LONG}/{LONG}"
    assert status["checkpoint"]["step"] == LONG
    assert status["adapter"]["baseModel"] == "pvc://inputs/model"
    assert status["adapter"]["baseRevision"] == status["modelRevision"]
    assert (status["adapter"]["rank"], status["adapter"]["servedRank"]) == (4, 8)
    assert status["startTime"] <= status["completionTime"]


def test_conditions_end_every_wait(finished: Finished) -> None:
    conditions = {c["type"]: c["status"] for c in finished.status["conditions"]}
    assert (conditions["Succeeded"], conditions["Failed"]) == ("True", "False")
    assert conditions.get("Reconciling") != "True"
    assert conditions.get("Stalled") != "True"


@pytest.mark.usefixtures("finished")
def test_every_change_of_phase_is_an_event(tenant: Tenant) -> None:
    def all_phases() -> list[str] | None:
        events = tenant.get("events", f"--field-selector=involvedObject.name={NAME}")["items"]
        reasons = [event["reason"] for event in events]
        return reasons if {"Preparing", "Training", "Publishing", "Succeeded"} <= set(reasons) else None

    # An Event follows the status.
    reasons = eventually(all_phases, seconds=60, what="an Event of each phase") or []
    assert len(reasons) == len(set(reasons)), f"an event was doubled: {reasons}"


def test_the_demo_copies_the_adapter_and_the_report(tenant: Tenant, finished: Finished, tmp_path: Path) -> None:
    """It compares the sum of the status with the file's."""
    job = {"metadata": {"name": NAME, "namespace": tenant.namespace}, "status": finished.status}
    demo.fetch(tenant.cluster.kubectl, tenant.cluster.images.trainer, job, tmp_path)
    assert (tmp_path / "report" / "loss.png").stat().st_size > 0


def qlora(tenant: Tenant, *arguments: str) -> str:
    """Output of the command, which must succeed."""
    options = [f"--namespace={tenant.namespace}", "--kubeconfig", str(tenant.cluster.kubectl.kubeconfig)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", *arguments, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_downloads_the_adapter_and_the_report_and_leaves_no_pod(
    tenant: Tenant, finished: Finished, tmp_path: Path
) -> None:
    adapter, report, picture = tmp_path / "adapter", tmp_path / "report.html", tmp_path / "curve.svg"
    assert finished.status["adapter"]["sha256"] in qlora(tenant, "adapter", NAME, "--output", str(adapter))
    content = (adapter / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == finished.status["adapter"]["sha256"]
    qlora(tenant, "report", NAME, "--output", str(report), "--no-open")
    assert NAME in report.read_text()
    table, *lines = (adapter / "metrics.csv").read_text().splitlines()
    assert (table.partition(",")[0], lines[-1].partition(",")[0]) == ("step", str(LONG))
    # It has not trained, so that only the first has a curve.
    other = tenant.apply(tiny_job("other", suspend=True))
    compared = qlora(tenant, "compare", NAME, other, "--picture", str(picture))
    assert f"{LONG}/{LONG}" in compared
    assert f"A  {NAME}" in compared
    assert picture.read_text().startswith("<?xml")
    readers = "--selector=app.kubernetes.io/name=qlora-reader"
    eventually(lambda: tenant.get("pods", readers)["items"] == [], seconds=60, what="no pod of a reader")


def test_the_command_line_finds_no_problem_in_the_cluster(tenant: Tenant) -> None:
    checks = json.loads(qlora(tenant, "doctor", "--output", "json"))["checks"]
    assert [check for check in checks if check["verdict"] == "problem"] == []
    found = {check["name"]: check["verdict"] for check in checks}
    assert [found[name] for name in ("Operator", "Operator's Lease", "Definitions", "Your rights")] == ["ok"] * 4


def test_plain_peft_loads_the_adapter_and_it_lowers_held_out_loss(
    tenant: Tenant, finished: Finished, tiny_model: Path, tmp_path: Path
) -> None:
    name, _, folder = finished.status["adapter"]["uri"].removeprefix("pvc://").partition("/")
    with tenant.volume(name) as pod:
        pod.get(folder, tmp_path / "adapter")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization, dtype=torch.bfloat16)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    before = held_out_loss(base, tiny_model)
    after = held_out_loss(PeftModel.from_pretrained(base, tmp_path / "adapter"), tiny_model)
    # A random base of two layers can be taught little.
    assert after < before - 0.2


def held_out_loss(model: torch.nn.Module, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    model.eval()
    with torch.no_grad():
        for number in range(64, 72):
            text = tokenizer.apply_chat_template(json.loads(json.dumps(row(number)["messages"])), tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)


@pytest.mark.usefixtures("finished")
def test_only_prepare_has_the_secret_and_only_train_asks_for_a_gpu(tenant: Tenant) -> None:
    pods = {pod["metadata"]["labels"]["qlora.dev/step"]: pod for pod in tenant.children(NAME, "pods")}
    assert set(pods) == {"prepare", "train", "publish"}
    for step, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (step == "train")
        assert any("secret" in volume for volume in pod["spec"]["volumes"]) == (step == "prepare")
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.usefixtures("finished")
def test_only_the_status_of_the_users_object_is_written(tenant: Tenant) -> None:
    metadata = tenant.job(NAME)["metadata"]
    assert "finalizers" not in metadata
    assert set(metadata.get("annotations", {})) == {"kubectl.kubernetes.io/last-applied-configuration"}
    for child in tenant.children(NAME, "jobs"):
        assert not [key for key in child["metadata"].get("annotations", {}) if "kopf" in key]


def test_a_deleted_pod_is_resumed_to_the_same_bytes(tenant: Tenant, deleted: Object, finished: Finished) -> None:
    status = tenant.succeed(INTERRUPTED)
    first, *others = [attempt["podUid"] for attempt in tenant.attempts(INTERRUPTED)]
    assert first == deleted["metadata"]["uid"]
    assert others
    assert first not in others
    assert tenant.adapter_sum(status) == tenant.adapter_sum(finished.status)


@pytest.mark.usefixtures("deleted")
def test_bad_input_fails_before_a_gpu_is_requested(tenant: Tenant) -> None:
    tenant.require_rejected(BAD, "BadDataset", "line 2")


@pytest.mark.usefixtures("deleted")
def test_cells_of_a_pod_are_trained_by_it_together(tenant: Tenant) -> None:
    status = tenant.sweep_succeeded(SWEEP)
    cells = [cell["name"] for cell in status["cells"]]
    assert cells == [f"{SWEEP}-00", f"{SWEEP}-01"]
    (pod,) = tenant.get("pods", f"--selector={SWEEP_LABEL}={SWEEP}")["items"]
    for name in cells:
        assert [attempt["podUid"] for attempt in tenant.attempts(name)] == [pod["metadata"]["uid"]], name
    assert status["best"]["sha256"] == tenant.status(status["best"]["cell"])["adapter"]["sha256"]
