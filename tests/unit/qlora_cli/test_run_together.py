"""What `qlora run` of several files says and stores around the steps, which are replaced here."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobDocument
from qlora_cli.local import run_together
from qlora_cli.local.display import ConsoleDisplay
from qlora_cli.local.run import Ended, LocalRun
from qlora_trainer.core.failures import StepFailure
from tests.support.tiny import merged

SPEC: dict[str, Any] = {
    "model": {"source": "hf://acme/model"},
    "dataset": {"source": "hf://acme/rows"},
    "lora": {"rank": 16},
}


def runs(root: Path, **outputs: dict[str, str]) -> list[LocalRun]:
    """A run of a job of each name, with this output."""
    documents = [
        QLoRAJobDocument.model_validate(
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "metadata": {"name": name},
                "spec": merged(SPEC, {"output": output} if output else {}),
            }
        )
        for name, output in outputs.items()
    ]
    return run_together.joint_runs(documents, [], LocalRun(documents[0], root, {}, {}, "cpu"))


def shown(root: Path, jobs: list[LocalRun]) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    displays = [ConsoleDisplay(console, job.layout.records, job=job.document.metadata.name) for job in jobs]
    run_together.run_jobs_together(root, jobs, displays)
    return output.getvalue()


@pytest.fixture
def diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are prepared, and the process that trains them ends with the failure of the first."""
    monkeypatch.setattr(run_together, "go_through", lambda *_: Ended(0, None, {}))
    monkeypatch.setattr(run_together, "run_step", lambda *_: (int(ExitCode.DIVERGED), None))


@pytest.mark.usefixtures("diverged")
def test_a_job_that_fails_beside_the_first_is_named_with_the_log_that_has_the_reason(tmp_path: Path) -> None:
    jobs = runs(tmp_path, first={}, second={}, third={})
    completion = jobs[2].layout.completion("train")
    completion.parent.mkdir(parents=True)
    completion.write_text("{}")
    text = shown(tmp_path, jobs)
    assert f"second: train: training did not finish; see {jobs[0].layout.records / 'train.log'}." in text
    assert "third" not in text


@pytest.mark.usefixtures("diverged")
def test_jobs_of_an_earlier_run_in_the_folder_are_resumed_too(tmp_path: Path) -> None:
    shown(tmp_path, runs(tmp_path, a={}, b={}, c={}))
    shown(tmp_path, runs(tmp_path, a={}, b={}))
    assert json.loads((tmp_path / "jobs.json").read_text()) == ["a", "b", "c"]
    earlier = run_together.earlier_runs(tmp_path)
    assert [run.document.metadata.name for run in earlier or ()] == ["a", "b", "c"]


def test_two_jobs_cannot_publish_to_one_place(tmp_path: Path) -> None:
    place = {"destination": "pvc://adapters/support"}
    with pytest.raises(StepFailure, match=r"spec.output.destination of b is .*, where a publishes") as failure:
        runs(tmp_path, a=place, b={"destination": "pvc://adapters/support/"})
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert runs(tmp_path, a=place, b={"destination": "pvc://adapters/billing"})
