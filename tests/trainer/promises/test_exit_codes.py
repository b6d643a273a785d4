"""Each ending of a step: exit code, record, and files; by the command line where the process matters."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode, ResultRecord
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import Done, Files, new_files
from tests.support.failures import failing
from tests.support.models.tiny import Recorded
from tests.support.ranks import beginning_with, until, waiting_at
from tests.support.runs.published import context
from tests.support.training import run


@pytest.fixture
def files(tmp_path: Path, tiny_llama: Path) -> Files:
    """A job that nothing has been done for."""
    return new_files(tmp_path / "job", tiny_llama.parent)


@pytest.fixture
def prepared(tmp_path: Path, finished: Files) -> Files:
    """A prepared job."""
    files = finished.copied(tmp_path / "job").with_spec({"training": {"samples": 0}})
    for folder in ("checkpoints", "trained", "adapter", "report"):
        shutil.rmtree(files.workspace / folder)
    for step in ("train", "publish"):
        (files.workspace / "records" / f"{step}.json").unlink()
    (files.workspace / "records" / "attempts.jsonl").unlink()
    return files


def failed(done: Done, code: ExitCode, *words: str) -> None:
    """Check the step's failure by the words of its sentence, its only report."""
    assert done.exit_code == code, done.stdout + done.stderr
    assert (done.result.outcome, done.result.reason) == ("failed", code.reason)
    for word in words:
        assert word in done.result.message
    assert done.stderr == ""


def test_10_a_document_that_no_api_server_would_have_admitted(files: Files) -> None:
    done = files.with_spec({"lora": {"rank": 0}}).run("prepare")
    failed(done, ExitCode.BAD_CONFIGURATION, "spec.lora.rank", "greater than or equal to 1")


def test_10_a_workspace_that_cannot_be_written(files: Files) -> None:
    files.workspace.write_text("a file where the folder should be")
    failed(files.run("prepare"), ExitCode.BAD_CONFIGURATION, str(files.workspace), "cannot be written")


def test_11_a_file_with_an_undecodable_name_next_to_the_data(files: Files) -> None:
    Path(os.fsdecode(bytes(files.data) + b"/caf\xe9.jsonl")).touch()
    done = files.with_spec({"dataset": {"source": "pvc://data/other.jsonl"}}).run("prepare")
    failed(done, ExitCode.BAD_DATASET, "other.jsonl does not exist", "caf\\udce9.jsonl")


# Without a GPU nothing can use up its memory: PyTorch's error is raised where the gradients are clipped.
FULL_GPU = """
import torch

def clip(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

torch.nn.utils.clip_grad_norm_ = clip
"""


def test_13_the_gpu_runs_out_of_memory(tmp_path: Path, prepared: Files) -> None:
    done = prepared.run("train", **beginning_with(tmp_path / "code", FULL_GPU))
    failed(done, ExitCode.GPU_OUT_OF_MEMORY, "out of memory", "spec.training.maxSequenceLength")


# As the volume's limit, which no user of a test can set: no file may be larger.
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def test_16_the_volume_does_not_take_the_file(tmp_path: Path, files: Files) -> None:
    done = files.run("prepare", **beginning_with(tmp_path / "code", SMALL_FILES))
    failed(done, ExitCode.STORAGE_FULL, "full", "spec.workspace.size")


@pytest.mark.slow
def test_16_the_volume_is_full(prepared: Files) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    volume, content = prepared.workspace, prepared.workspace.with_name("content")
    volume.rename(content)
    volume.mkdir()
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", str(volume)], check=False).returncode != 0:
        pytest.skip("a volume that is full needs the right to mount one in a namespace of its own")
    used = sum(path.stat().st_size + 4096 for path in content.rglob("*"))
    script = f'mount -t tmpfs -o size={used + 65536} none $0 && cp -r $1/. $0 && shift && exec "$@"'
    done = prepared.run("train", prefix=[*namespace, "sh", "-c", script, str(volume), str(content)])
    failed(done, ExitCode.STORAGE_FULL, "full")


def test_17_a_run_that_cannot_fit_the_card(tmp_path: Path, files: Files, records: Recorded) -> None:
    models = shutil.copytree(files.models, tmp_path / "models")
    config = json.loads((models / "model" / "config.json").read_text())
    # Of its weights nothing is read before.
    (models / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": 4096, "vocab_size": 128_000}))
    spec = {"resources": {"gpuMemory": "1Gi"}, "training": {"microBatchSize": 4}}
    with failing(ExitCode.DOES_NOT_FIT, "gpuMemory of spec.resources", "spec.training.microBatchSize"):
        prepare(context(replace(files, models=models).with_spec(spec)), records)
    assert records.findings.memory is not None
    assert records.findings.memory.verdict == "exceeds"
    assert not (files.workspace / "data").exists()


def test_18_attempts_that_are_killed_without_a_new_checkpoint(prepared: Files) -> None:
    records = prepared.workspace / "records"
    killed = {"podUid": "gone", "jobAttempt": 1, "startedAt": "2026-01-02T03:04:05Z", "fromStep": 0}
    (records / "attempts.jsonl").write_text((json.dumps(killed) + "\n") * 4)
    process = prepared.start("train")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with failing(ExitCode.RETRIES_EXHAUSTED, "5 attempts in a row", "spec.retry.request"):
        run(context(prepared))


@pytest.mark.usefixtures("one_thread")
def test_143_interrupted_training_continues_to_the_same_adapter(
    tmp_path: Path, prepared: Files, finished: Files, records: Recorded
) -> None:
    process = prepared.start("train", **waiting_at(tmp_path / "code", 2, 0))
    read = until(process, 2)
    process.terminate()
    done = prepared.finish(process, read)
    assert (done.exit_code, done.result.outcome, done.result.reason) == (143, "interrupted", "Interrupted")
    assert done.result.training_step == 2
    assert (prepared.workspace / "checkpoints" / "step-2").is_dir()

    run(context(prepared), records=records)
    assert records.written[0]["trainingStep"] == 2
    adapters = [files.workspace / "trained" / "adapter_model.safetensors" for files in (prepared, finished)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Address of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_143_a_step_without_checkpoints_stops_immediately(files: Files, silent_hub: str) -> None:
    process = files.with_spec({"model": {"source": "hf://acme/tiny"}}).start("prepare", HF_ENDPOINT=silent_hub)
    assert process.stdout is not None
    read = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    done = files.finish(process, read)
    assert (done.exit_code, done.result.outcome) == (143, "interrupted")
    assert done.stderr == ""


def test_200_a_hub_that_cannot_be_reached(files: Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    done = files.with_spec({"model": {"source": "hf://acme/tiny"}}).run(
        "prepare", HF_ENDPOINT=f"http://127.0.0.1:{closed}"
    )
    failed(done, ExitCode.UNREACHABLE, "acme/tiny")


def test_200_a_claim_that_does_not_exist_yet(files: Files, records: Recorded) -> None:
    with failing(ExitCode.UNREACHABLE, "other"):
        prepare(context(files.with_spec({"dataset": {"source": "pvc://other/train.jsonl"}})), records)


def test_203_an_unexpected_error(tmp_path: Path, finished: Files) -> None:
    files = finished.copied(tmp_path / "job")
    (files.workspace / "records" / "publish.json").unlink()
    (files.workspace / "report" / "metrics.jsonl").write_text('{"step": 1, "loss": "hf_abcdefghijklmnop"}\n')
    done = files.run("publish")
    assert (done.exit_code, done.result.reason) == (203, "InternalError")
    assert "could not convert string to float: '[redacted]'" in done.result.message
    assert done.stderr.startswith("Traceback ")
    assert "metrics_log.py" in done.stderr
    assert "hf_abcdefghijklmnop" not in done.stderr


# Without a GPU, each call of CUDA fails. The reaction of bitsandbytes does not depend on the reason.
FAILING_CUDA = """
import ctypes
from pathlib import Path
import bitsandbytes
from qlora_trainer.training import objective

def batch_loss(model, batch):
    library = max(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda13*.so"))
    ctypes.CDLL(str(library)).cget_managed_ptr(ctypes.c_size_t(4096))

objective.batch_loss = batch_loss
"""


def test_a_cuda_error_in_bitsandbytes_ends_with_exit_code_1_and_a_log_line(prepared: Files, tmp_path: Path) -> None:
    # Not a fork of this process, where what other tests have started would end too.
    done = prepared.run("train", ("env",), **beginning_with(tmp_path / "code", FAILING_CUDA))
    assert done.exit_code == 1, done.stdout + done.stderr
    assert not any(isinstance(record, ResultRecord) for record in done.records)
    log = (prepared.workspace / "records" / "train.log").read_text()
    assert re.search(r"^Error .+ at line \d+ in file ", log.splitlines()[-1])
