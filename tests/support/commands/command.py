"""The trainer's and the user's command lines as separate processes: output, files and exit codes.

A step is a fork of the tests' process, which has loaded the trainer: each start takes seconds of imports. It is a true
start with a prefix, or a variable that a library may read when it is imported: the steps of `finished`, the two
processes of `together`, training on two threads, a hostile environment.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from qlora_api.contract import (
    ENV_GROUP_SIZE,
    ENV_NODE,
    ENV_NODE_WAIT,
    ENV_POD_UID,
    ENV_RENDEZVOUS,
    ProgressRecord,
    ResultRecord,
    decode_record,
)
from qlora_cli.__main__ import main
from tests.support.commands.image import as_in_image
from tests.support.manifests import merged
from tests.support.models.tiny import JOB_UID, POD_UID, chat_row, write_rows
from tests.support.resolved import TRAINING

TIMEOUT_S = 500
_READ_LATE = (
    *(ENV_GROUP_SIZE, ENV_NODE, ENV_NODE_WAIT, ENV_POD_UID, ENV_RENDEZVOUS),
    *("HF_ENDPOINT", "HF_TOKEN", "PYTHONPATH"),
)
"""Variables that a step reads when it runs; a fork runs the code that `beginning_with` puts on the path."""

_OF_A_STEP = {
    "QLORA_POD_UID": POD_UID,
    "QLORA_DEVICE": "cpu",
    # As numbers that are added in another order are other ones: tests compare bytes.
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}
SPEC: dict[str, Any] = {
    "model": {"source": "pvc://models/model"},
    "dataset": {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0.25}},
    "lora": {"rank": 4, "alpha": 8},
    "training": TRAINING
    | {
        "maxSteps": 30,
        "gradientAccumulationSteps": 1,
        "maxSequenceLength": 64,
        "learningRate": 0.005,
        "samples": 0,
        "evalEverySteps": 10,
    },
}
MANIFEST = """\
apiVersion: qlora.dev/v1beta1
kind: QLoRAJob
metadata:
  name: tiny
spec:
  model:
    source: pvc://models/model
  dataset:
    source: pvc://data/train.jsonl
  lora:
    rank: 8
  training:
    maxSteps: 3
    learningRate: 2e-4
"""
"""A user's file."""
ROWS = [chat_row(f"List the pods of namespace n{i}.", f"kubectl get pods --namespace n{i}") for i in range(40)]


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    termination: str

    @property
    def records(self) -> list[ProgressRecord | ResultRecord]:
        """Standard output; every line must be a record of this job and pod."""
        records = [decode_record(line, job_uid=JOB_UID, pod_uid=POD_UID) for line in self.stdout.splitlines()]
        assert None not in records, f"not only records on standard output: {self.stdout}"
        return [record for record in records if record is not None]

    @property
    def result(self) -> ResultRecord:
        """The last line, which the kubelet must read, and the only result."""
        *earlier, last = self.records
        assert isinstance(last, ResultRecord)
        assert not any(isinstance(record, ResultRecord) for record in earlier)
        assert self.stdout.splitlines()[-1] == self.termination
        assert last.exit_code == self.exit_code
        return last


@dataclass(frozen=True)
class Files:
    """A job, its workspace and its claims, below one folder."""

    root: Path
    models: Path
    spec: dict[str, Any] = field(default_factory=lambda: SPEC)
    others: tuple["Files", ...] = ()
    """Jobs that are trained together with this one, on the same base."""

    @property
    def workspace(self) -> Path:
        """The job's folder."""
        return self.root / "workspace"

    @property
    def data(self) -> Path:
        """The claim `data`."""
        return self.root / "data"

    @property
    def document(self) -> dict[str, Any]:
        """A user's manifest, with the UID that the API server gives it."""
        metadata = {"name": "tiny", "uid": JOB_UID}
        return {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": metadata, "spec": self.spec}

    def with_spec(self, changes: dict[str, Any]) -> "Files":
        """The same files with another spec."""
        return replace(self, spec=merged(self.spec, changes))

    def copied(self, root: Path) -> "Files":
        """A copy to change, over the same models."""
        shutil.copytree(self.root, root)
        return replace(self, root=root)

    def command(self, step: str) -> list[str]:
        """The trainer's command line for a step, with the job's document written."""
        job = self.root / "job.json"
        job.write_text(json.dumps(self.document))
        return [
            *(sys.executable, "-m", "qlora_trainer", step, "--job", str(job), "--workspace", str(self.workspace)),
            *("--volume", f"models={self.models}", "--volume", f"data={self.data}"),
            *("--termination-log", str(self.root / "termination-log")),
            *(argument for other in self.others for argument in other._beside(step)),
        ]

    def _beside(self, step: str) -> tuple[str, ...]:
        """The arguments for this job, with its document written, where another job has it among its `others`."""
        self.command(step)
        return "--with", str(self.root / "job.json"), str(self.workspace)

    def start(self, step: str, prefix: Sequence[str] = (), **environment: str) -> "subprocess.Popen[str]":
        """The step's process, running: a fork, unless a program starts it or variables are read at its start."""
        folders = [each for job in (self, *self.others) for each in (job.root, job.models)]
        command = [*prefix, *as_in_image(self.command(step), _OF_A_STEP | environment, folders)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if prefix or any(name not in _READ_LATE for name in environment):
            return subprocess.Popen(command, env=_environment(environment), **pipes)
        # It loads PyTorch, which tests of the API do without.
        from tests.support.runs.forked_step import start_forked

        return start_forked(command, _environment(environment), **pipes)

    def finish(self, process: "subprocess.Popen[str]", read: str = "") -> Done:
        """Wait for a process of `start`, of whose standard output `read` has been read."""
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        log = self.root / "termination-log"
        return Done(process.returncode, read + stdout, stderr, log.read_text() if log.exists() else "")

    def run(self, step: str, prefix: Sequence[str] = (), **environment: str) -> Done:
        """Run the step to its end."""
        return self.finish(self.start(step, prefix, **environment))


def new_files(root: Path, models: Path, spec: dict[str, Any] | None = None) -> Files:
    """A job with its data and an empty workspace."""
    files = Files(root, models).with_spec(spec or {})
    write_rows(files.data / "train.jsonl", ROWS)
    return files


def qlora(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The user's command line, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_cli", *arguments],
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def invoked(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The same in this process, which suffices where no step is started."""
    done = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def _environment(changes: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **_OF_A_STEP, **changes}
