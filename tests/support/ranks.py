"""Jobs whose train step has two processes, and programs that start and watch these."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from devcluster.addresses import free_port
from qlora_api.contract import ENV_NODE, ENV_POD_UID, ENV_RENDEZVOUS, ProgressRecord, decode_record
from qlora_trainer.core.context import StepContext
from tests.support.commands.command import Done, Files
from tests.support.manifests import merged
from tests.support.models.tiny import JOB_UID, POD_UID
from tests.support.training import history, prepared
from tests.support.waiting import eventually

TWO: dict[str, Any] = {"resources": {"gpus": 2}}
SHARDED = merged(TWO, {"training": {"sharding": "full"}})
# Five micro batches a step do not divide by two, and the last step of an epoch has fewer.
EXACT = {"lora": {"dropout": 0.0}, "training": {"gradientAccumulationSteps": 5}}


def workspace(root: Path, model: Path, spec: dict[str, Any], **settings: Any) -> tuple[Files, StepContext]:
    """A prepared workspace for the command line; `spec` changes the job of six steps."""
    context = prepared(root / "workspace", model, spec, **settings)
    return Files(root, model.parent, context.spec.dump()), context


def succeeded(done: Done) -> None:
    """The step has ended well, and reports it."""
    assert done.exit_code == 0, done.stdout + done.stderr
    assert done.result.outcome == "succeeded"


def same_numbers(found: StepContext, expected: StepContext, tolerance: float, of_norms: float | None = None) -> None:
    """Check that both runs noted equal losses and gradient norms, within a tolerance."""
    ours, theirs = history(found), history(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for name in ("loss", "evalLoss", "gradNorm"):
        values = [line[name] for line in theirs if name in line]
        assert values
        assert [line[name] for line in ours if name in line] == pytest.approx(
            values, rel=of_norms if of_norms and name == "gradNorm" else tolerance
        )


def until(process: "subprocess.Popen[str]", step: int, pod: str = POD_UID) -> str:
    """Output of the process until `step` steps are done."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        record = decode_record(line, job_uid=JOB_UID, pod_uid=pod)
        if isinstance(record, ProgressRecord) and record.training_step >= step:
            return said
    raise AssertionError(f"it ended before step {step}: {said}")


def other(process: "subprocess.Popen[str]") -> int:
    """Process id of the second rank, which the main process has started."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def two_nodes() -> list[tuple[str, ...]]:
    """Return commands that start the step on two nodes: here, two agents of torchrun."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--no-python", "--nnodes", "2", "--nproc-per-node", "1")
    store = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    return [(*torchrun, *store, "--node-rank", str(node)) for node in range(2)]


@dataclass(frozen=True)
class Pods:
    """A job of several nodes, whose pods are local processes over one workspace."""

    files: Files
    port: int

    @classmethod
    def of(cls, files: Files) -> "Pods":
        """Pods that meet at a port that is free."""
        return cls(files, free_port())

    def start(self, node: int, name: str = POD_UID, **environment: str) -> "Pod":
        """The train pod of that node. `name`: its UID."""
        own = replace(self.files, root=self.files.root / name / f"node-{node}")
        own.root.mkdir(parents=True)
        for shared in (self.files.workspace, self.files.data):
            (own.root / shared.name).symlink_to(shared)
        # Node 0 does not need the name where the others reach it.
        host = "127.0.0.1" if node else "node-0.invalid"
        place = {ENV_NODE: str(node), ENV_RENDEZVOUS: f"{host}:{self.port}", ENV_POD_UID: name}
        return Pod(own, own.start("train", **{**place, **environment}))


@dataclass(frozen=True)
class Pod:
    """One of them."""

    files: Files
    process: "subprocess.Popen[str]"

    def done(self, said: str = "") -> Done:
        """Its ending. `said`: the read part of its standard output."""
        return self.files.finish(self.process, said)


def limit_second_gpu(rows: int) -> None:
    """Give this process, if it is the second, a fake GPU for so many rows."""
    if os.environ.get("RANK") != "1":
        return
    import torch

    from qlora_trainer.training import objective

    loss = vars(objective)["batch_loss"]

    def limited(model: Any, batch: Any) -> Any:
        if len(batch.rows.lengths) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)

    vars(objective)["batch_loss"] = limited


def waiting_at(folder: Path, step: int, *ranks: int, code: str = "") -> dict[str, str]:
    """Return an environment that lets these ranks wait for a signal after so many steps.

    `until_waiting` shows that they do: a signal that comes before may be lost.
    """
    place = ", ".join(map(str, (step, *ranks, f"folder={str(folder)!r}")))
    wait = f"from tests.support.runs.waiting_step import wait_at\nwait_at({place})\n"
    return beginning_with(folder, wait + code)


def until_waiting(folder: Path, *ranks: int) -> None:
    """Wait until the processes of `waiting_at` wait for a signal."""
    marks = [folder / f"waits-{rank}" for rank in ranks]
    eventually(lambda: all(mark.exists() for mark in marks), seconds=300, every=0.01, what=f"{ranks} that wait")


def beginning_with(folder: Path, code: str) -> dict[str, str]:
    """Return an environment whose Python processes run this code first, from `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
