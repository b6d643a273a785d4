"""Jobs that look finished and are not: neither the step nor the job may succeed.

Each case damages a trained job, or stops it at a critical moment, and then runs the trainer's command line and the
operator's decision on the remaining files.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_api.contract import ExitCode
from qlora_api.status import QLoRAJobStatus
from qlora_trainer.core.completion import TrainRecord, read_completion, write_completion
from qlora_trainer.core.failures import Interrupted, StopRequest
from tests.support.builders import FACTS, child, ended, follow, make_job, pod, result, status_in
from tests.support.commands.command import Done, Files
from tests.support.failures import failing
from tests.support.models.tiny import JOB_UID, POD_UID
from tests.support.runs.published import published
from tests.support.training import StopAtStep, prepared, run

Spoil = Callable[[Files], None]


def adapter_file(files: Files) -> Path:
    return files.workspace / "trained" / "adapter_model.safetensors"


def record_of(files: Files) -> TrainRecord:
    record = read_completion(files.workspace / "records" / "train.json", TrainRecord)
    assert record is not None
    return record


def rewritten(files: Files, **changes: Any) -> None:
    """Write the train record with other contents."""
    write_completion(files.workspace / "records" / "train.json", record_of(files).model_copy(update=changes))


def with_tensors(change: Callable[[dict[str, Tensor]], None], *, forge_sum: bool = True) -> Spoil:
    """Change the trained tensors; `forge_sum`: the train record gets their SHA-256."""

    def spoil(files: Files) -> None:
        tensors = load_file(adapter_file(files))
        change(tensors)
        save_file(tensors, adapter_file(files), metadata={"format": "pt"})
        if forge_sum:
            rewritten(files, adapter_sha256=sha256(adapter_file(files).read_bytes()).hexdigest())

    return spoil


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)][0, 0] = float("nan")


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("inf")


def one_missing(tensors: dict[str, Tensor]) -> None:
    del tensors[max(tensors)]


def one_more(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 64)


def of_another_rank(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.ones(8, tensors[min(tensors)].shape[1])


def of_another_type(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)] = tensors[max(tensors)].bfloat16()


def zero(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def half_trained(tensors: dict[str, Tensor]) -> None:
    tensors[min(name for name in tensors if "lora_B" in name)].zero_()


def nudged(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] += 1e-6


def truncated(files: Files) -> None:
    os.truncate(adapter_file(files), adapter_file(files).stat().st_size - 1)


def gone(files: Files) -> None:
    shutil.rmtree(files.workspace / "trained")


def not_to_the_end(files: Files) -> None:
    rewritten(files, training_step=record_of(files).training_step - 1)


def of_another_spec(files: Files) -> None:
    rewritten(files, fingerprint="0" * 64)


def of_other_data(files: Files) -> None:
    path = files.workspace / "records" / "prepare.json"
    (rows,) = json.loads(path.read_text())["dataContent"]["rows"]
    path.write_text(path.read_text().replace(rows, "f" * 64))


def rows_cut(files: Files) -> None:
    (path,) = files.workspace.glob("data/*/train.safetensors")
    os.truncate(path, path.stat().st_size - 1)


def record_cut(files: Files) -> None:
    path = files.workspace / "records" / "train.json"
    os.truncate(path, path.stat().st_size // 2)


def record_missing(files: Files) -> None:
    (files.workspace / "records" / "train.json").unlink()


def elsewhere(files: Files) -> None:
    outside = files.root / "outside"
    shutil.move(files.workspace / "trained", outside)
    (files.workspace / "trained").symlink_to(outside)


def killed_in_the_last_save(files: Files) -> None:
    record_missing(files)
    gone(files)
    last = max(files.workspace.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    last.rename(last.with_name(f".{last.name}.partial"))


def killed_before_the_record(files: Files) -> None:
    record_missing(files)
    (files.workspace / "trained").rename(files.workspace / ".trained.partial")


def occupied(files: Files) -> None:
    (files.workspace / "adapter").mkdir()
    (files.workspace / "adapter" / "adapter_model.safetensors").write_bytes(adapter_file(files).read_bytes())


UNSAFE, UNUSABLE, BUG = ExitCode.UNSAFE_ARTIFACT, ExitCode.BAD_CONFIGURATION, ExitCode.INTERNAL_ERROR
SPOILED: dict[str, tuple[Spoil, ExitCode, str]] = {
    "the adapter holds NaN": (with_tensors(nan), ExitCode.DIVERGED, "NaN"),
    "the adapter holds infinity": (with_tensors(infinite), ExitCode.DIVERGED, "infinite"),
    "a tensor is missing": (with_tensors(one_missing), BUG, "lacks 1 of 28 tensors"),
    "a tensor is too many": (with_tensors(one_more), BUG, "unexpected 1 of 28 tensors"),
    "a tensor has another rank": (with_tensors(of_another_rank), BUG, "has shape [8, 128], not [4, 128]"),
    "a tensor has another type": (with_tensors(of_another_type), BUG, "spec.lora.dtype is float32"),
    "the adapter is zero": (with_tensors(zero), UNUSABLE, "still zero, unchanged"),
    "a layer never learned": (with_tensors(half_trained), BUG, "no gradient has reached 1 of 14 layers"),
    "the adapter was changed after training": (with_tensors(nudged, forge_sum=False), UNSAFE, "sha256"),
    "the adapter's file is cut": (truncated, UNSAFE, ""),
    "the adapter is gone": (gone, UNSAFE, ""),
    "the record says fewer steps than planned": (not_to_the_end, UNSAFE, ""),
    "the record is of another spec": (of_another_spec, UNSAFE, "another run"),
    "the record is of other data": (of_other_data, UNSAFE, ""),
    "the prepared rows are damaged": (rows_cut, ExitCode.BAD_DATASET, ""),
    "the record is cut": (record_cut, UNUSABLE, ""),
    "there is no record": (record_missing, UNUSABLE, "run the train step first"),
    "killed in the last save": (killed_in_the_last_save, UNUSABLE, ""),
    "killed before the record": (killed_before_the_record, UNUSABLE, ""),
    "the adapter is a link out of the workspace": (elsewhere, UNSAFE, ""),
    "another program's files are at the destination": (occupied, UNUSABLE, "no QLoRAJob published"),
}


@pytest.mark.parametrize("way", SPOILED)
def test_an_incomplete_or_untrained_adapter_is_never_published(trained: Files, way: str) -> None:
    spoil, code, words = SPOILED[way]
    spoil(trained)
    with failing(code, words):
        published(trained)
    assert not (trained.workspace / "records" / "publish.json").exists()
    assert not (trained.workspace / "adapter" / "manifest.json").exists()


def verdict(done: Done) -> QLoRAJobStatus:
    """Return the operator's verdict on a publish pod's end and termination message."""
    body = pod("publish")
    body["metadata"]["uid"] = POD_UID
    job = make_job(status_in("publish"))
    kind = "Complete" if done.exit_code == 0 else "Failed"
    message = done.termination.replace(JOB_UID, job.uid)
    return follow(job, child("publish", **dict[str, Any]({kind: ""})), ended(body, done.exit_code, message))


def test_a_real_success_is_one_for_trainer_and_operator(trained: Files) -> None:
    done = trained.run("publish")
    assert done.exit_code == 0, done.stderr
    assert verdict(done).phase == "Succeeded"


def test_a_rejected_adapter_is_no_success_for_the_operator(trained: Files) -> None:
    with_tensors(nan)(trained)
    done = trained.run("publish")
    assert done.result.outcome == "failed"
    assert verdict(done).phase == "Failed"


MESSAGES: dict[str, Callable[[Done], str]] = {
    "exit 0 without a record": lambda _: "",
    "a cut record": lambda done: done.termination[:-20],
    "another pod's record": lambda done: done.termination.replace(POD_UID, "7d0c2f5e-0000-4000-8000-00000000000f"),
    "another job's record": lambda done: done.termination.replace(JOB_UID, "7d0c2f5e-0000-4000-8000-00000000000e"),
    "another step's record": lambda done: done.termination.replace('"step":"publish"', '"step":"train"'),
    "a record without an adapter": lambda done: json.dumps(
        {key: value for key, value in json.loads(done.termination).items() if key != "adapter"}
    ),
    "a record that says that it failed": lambda done: done.termination.replace('"succeeded"', '"failed"'),
    "a SHA-256 that is not one": lambda done: done.termination.replace(
        json.loads(done.termination)["adapter"]["sha256"], "0"
    ),
}


@pytest.mark.parametrize("way", MESSAGES)
def test_exit_0_without_the_pods_record_is_no_success(finished: Files, way: str) -> None:
    stdout = (finished.root / "publish.stdout").read_text()
    whole = Done(0, stdout, "", stdout.splitlines()[-1])
    assert verdict(whole).phase == "Succeeded"
    forged = MESSAGES[way](whole)
    assert forged != whole.termination
    assert verdict(Done(0, stdout, "", forged)).phase != "Succeeded"


def with_perfect_record(code: int, reason: str) -> QLoRAJobStatus:
    """Return the operator's verdict on this end of a pod with a record of success."""
    body = pod("publish")
    message = result(body, "publish", **FACTS["publish"])
    kind = "Failed" if code else "Complete"
    bodies = (child("publish", **dict[str, Any]({kind: ""})), ended(body, code, message, reason=reason))
    return follow(make_job(status_in("publish")), *bodies)


@pytest.mark.parametrize(("code", "reason"), [(137, "OOMKilled"), (1, "OOMKilled"), (143, "Error"), (137, "Error")])
def test_a_killed_pod_with_a_perfect_record_is_no_success(code: int, reason: str) -> None:
    assert with_perfect_record(code, reason).phase != "Succeeded"


@pytest.mark.parametrize("reason", ["Completed", "OOMKilled"])
def test_exit_0_with_a_perfect_record_is_a_success_with_any_kubelet_reason(reason: str) -> None:
    """The kubelet reports OOMKilled also if the kernel killed only a child process of the trainer.

    The exit code is the trainer's: it exits with 0 and leaves this record only after it has verified the published
    files.
    """
    assert with_perfect_record(0, reason).phase == "Succeeded"


def test_a_run_that_is_stopped_in_its_last_step_does_not_report_that_it_is_done(
    tmp_path: Path, tiny_llama: Path
) -> None:
    context = prepared(tmp_path, tiny_llama)
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(5, stop))
    assert not context.workspace.completion("train").exists()
    assert not context.workspace.trained.exists()


def test_the_adapter_of_an_earlier_run_in_the_workspace_is_not_published(trained: Files) -> None:
    """Training has not run since the spec changed: the record is of the run before."""
    with failing(ExitCode.UNSAFE_ARTIFACT, "another run"):
        published(trained.with_spec({"training": {"learningRate": 0.004}}))
