"""The door in its pod, and a job that real pods train for a client of OpenAI's API."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types.fine_tuning.job_create_params import Hyperparameters

from devcluster import layout, product
from devcluster.product import NAMESPACE, SMALL_MACHINE
from tests.cluster.conftest import row
from tests.cluster.environment import Cluster, Tenant, tiny_job
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
MODEL = "tiny"


@pytest.fixture(scope="module")
def url(installed: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The door's address, forwarded by kubectl."""
    spec = tiny_job("template")["spec"]
    template = {name: part for name, part in spec.items() if name != "dataset"}
    where, door = layout.from_environment(), {"enabled": True, "settings": {"models": {MODEL: {"spec": template}}}}
    product.install(where, where.kubeconfig, installed.images, {**SMALL_MACHINE, "door": door})
    log = tmp_path_factory.mktemp("door") / "forward.log"
    command = [str(installed.kubectl.program), "--kubeconfig", str(where.kubeconfig), f"--namespace={NAMESPACE}"]
    with log.open("wb") as output:
        forward = subprocess.Popen(
            [*command, "port-forward", "service/qlora-operator-door", ":80"], stdout=output, stderr=output
        )
    try:
        found = eventually(lambda: re.findall(r"127\.0\.0\.1:(\d+)", log.read_text()), seconds=60, what="the forward")
        yield f"http://127.0.0.1:{found[0]}/v1"
    finally:
        forward.terminate()
        forward.wait()
        product.install(where, where.kubeconfig, installed.images)


@pytest.fixture(scope="module")
def key(tenant: Tenant) -> str:
    """A token of an account that may edit the tenant's namespace."""
    tenant.kubectl("create", "serviceaccount", "trainer")
    account = f"--serviceaccount={tenant.namespace}:trainer"
    tenant.kubectl("create", "rolebinding", "trainer", "--clusterrole=edit", account)
    return tenant.kubectl("create", "token", "trainer", "--audience=qlora-door").strip()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{json.dumps(row(number))}\n" for number in range(64)))
    return path


def test_the_example_fine_tunes(url: str, key: str, rows: Path, tenant: Tenant) -> None:
    program = Path(__file__).parents[2] / "examples" / "door" / "finetune.py"
    variables = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
    done = subprocess.run(
        [sys.executable, program, rows, MODEL], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    states = re.findall(r"^ftjob-\S+: (\w+)$", done.stdout, re.M)
    assert states[-1] == "succeeded"
    assert set(states) <= {"validating_files", "queued", "running", "succeeded"}
    found = re.search(r"^\d+ tokens: (?P<namespace>\S+)/(?P<job>\S+)@sha256:(?P<sha256>\w+)$", done.stdout, re.M)
    assert found is not None
    adapter = tenant.status(found["job"])["adapter"]
    assert (found["namespace"], found["sha256"]) == (tenant.namespace, adapter["sha256"])
    assert re.search(r"^\d+,\d+\.\d+,,", done.stdout, re.M)


def test_a_batch_size_and_a_multiplier_are_those_of_the_run(url: str, key: str, rows: Path, tenant: Tenant) -> None:
    client = OpenAI(base_url=url, api_key=key)
    with rows.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune").id
    asked: Hyperparameters = {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 0.5}
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file, validation_file=file, hyperparameters=asked)
    status = tenant.wait_for_end(job.id)
    assert status["phase"] == "Succeeded", status.get("lastFailure")
    assert status["progress"]["totalSteps"] == 8
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.hyperparameters.batch_size == 8
    assert client.files.content(ended.result_files[0]).text.splitlines()[-1].split(",")[3]


def test_a_canceled_job_is_stopped(url: str, key: str, rows: Path, tenant: Tenant) -> None:
    client = OpenAI(base_url=url, api_key=key)
    with rows.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file).id
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    assert client.files.delete(file).deleted
    assert tenant.wait_for_end(job)["phase"] == "Failed"
    assert tenant.condition(job, "Failed")["reason"] == "Cancelled"
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
