"""The user's command line runs a job: its folders, its steps, its end, and its resume."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from qlora_api.contract import CPU_ALLOCATOR, ResultRecord, WorkspaceLayout
from qlora_api.status import StepName
from qlora_cli.__main__ import main
from qlora_cli.local import run as local
from qlora_cli.local.run import Ended
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, read_completion
from qlora_trainer.core.cpu import preloaded_allocator
from tests.support.commands.command import MANIFEST, SPEC, Files, invoked, new_files, qlora
from tests.support.manifests import merged
from tests.support.ranks import waiting_at
from tests.support.runs.forked_step import start_forked


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork each step, whose start as another program takes seconds."""
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=start_forked, PIPE=subprocess.PIPE))


class ForkedRun(subprocess.Popen[str]):
    """`qlora` in a fork of the tests' process, with its patches."""

    def __init__(self, arguments: list[str], before: Callable[[], object] = lambda: None, **options: Any) -> None:
        def begin() -> None:
            # Of the parent, which else waits for another program to begin.
            os.closerange(3, 1024)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            before()
            try:
                main(arguments)
            except SystemExit as ended:
                os._exit(int(ended.code or 0))

        # Python ignores SIGPIPE.
        super().__init__(arguments, preexec_fn=begin, restore_signals=False, text=True, **options)


def test_a_run_of_several_nodes_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST + "  resources: {nodes: 2}\n")
    done = invoked("run", str(tmp_path / "job.yaml"), "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert "spec.resources.nodes is 2, and this command runs a job on one machine" in done.stderr


def manifest(files: Files, spec: dict[str, Any]) -> Path:
    """The job as a file; JSON is YAML."""
    path = files.root / "job.yaml"
    path.write_text(json.dumps({**files.document, "metadata": {"name": "tiny"}, "spec": spec}))
    return path


def arguments(files: Files, path: Path) -> list[str]:
    """The arguments of `qlora run` for these files."""
    volumes = ("--volume", f"models={files.models}", "--volume", f"data={files.data}")
    return ["run", str(path), "--workspace", str(files.workspace), *volumes, "--device", "cpu"]


def test_a_run_without_its_volumes_names_them_and_leaves_nothing(tmp_path: Path) -> None:
    mixed = MANIFEST.replace(
        "    source: pvc://data/train.jsonl\n", "    mix:\n      - source: pvc://data/train.jsonl\n"
    )
    (tmp_path / "job.yaml").write_text(mixed + "  output:\n    merged:\n      destination: pvc://whole/model\n")
    done = invoked("run", str(tmp_path / "job.yaml"), "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert "--volume models=DIR" in done.stderr
    assert "spec.dataset.mix[0].source is pvc://data/train.jsonl: give a folder for the claim" in done.stderr
    assert "--volume data=DIR" in done.stderr
    assert "spec.output.merged.destination is pvc://whole/model: give a folder for the claim" in done.stderr
    assert not (tmp_path / "work").exists()


def test_a_run_that_continues_another_one_is_given_its_workspace(tmp_path: Path) -> None:
    manifest, work = tmp_path / "job.yaml", tmp_path / "work"
    volumes = [f"--volume={name}={tmp_path}" for name in ("models", "data", "adapters")]
    manifest.write_text(f"{MANIFEST}  continues: first\n")
    done = invoked("run", str(manifest), "--workspace", str(work), *volumes)
    assert "spec.continues is first: give the workspace of that run with --continues DIR" in done.stderr
    initial = MANIFEST.replace("    rank: 8\n", "    rank: 8\n    from: {source: pvc://adapters/first}\n")
    manifest.write_text(initial)
    done = invoked("run", str(manifest), "--workspace", str(work), f"--continues={tmp_path}", *volumes[:2])
    assert "spec.lora.from.source is pvc://adapters/first: give a folder for the claim with --volume" in done.stderr
    assert "--continues is for a job that names another one in spec.continues: set that in FILE" in done.stderr
    assert not work.exists()


@pytest.mark.usefixtures("forked")
def test_a_run_shows_a_bar_stops_on_ctrl_c_and_resumes(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    command = arguments(files, manifest(files, SPEC))
    terminal, end = pty.openpty()

    def on_a_terminal() -> None:
        os.environ.update(waiting_at(tmp_path / "code", 3, 0), COLUMNS="160", TERM="xterm")

    process = ForkedRun(command, on_a_terminal, stdout=end, stderr=subprocess.STDOUT)
    os.close(end)
    figures = r"loss \d+\.\d{3}, held-out \d+\.\d{3}, \d+ tokens/s, \S+ left"
    shown = read_until(terminal, rf"Training.*training 3/30, {figures}")
    process.send_signal(signal.SIGINT)
    shown += read_until(terminal, r"qlora run --resume --workspace \S+")
    assert process.wait(300) == 130
    os.close(terminal)
    assert "━" in shown
    layout = WorkspaceLayout(files.workspace)
    assert [saved.name for saved in layout.checkpoints.iterdir()] == ["step-3"]

    done = invoked("run", "--resume", "--workspace", str(files.workspace))
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [json.loads(line) for line in (layout.records / "attempts.jsonl").read_text().splitlines()]
    assert [(attempt["fromStep"], attempt["ended"]) for attempt in attempts] == [
        (0, "interrupted"),
        (3, "succeeded"),
    ]
    assert "prepare: " in done.stdout
    assert str(layout.report / "report.html") in done.stdout
    record = read_completion(layout.completion("publish"), PublishRecord)
    assert record is not None
    assert record.adapter.sha256 in done.stdout
    assert str(layout.adapter) in done.stdout
    assert re.search(r"Held-out loss +\d\.\d{4} before, \d\.\d{4} after", done.stdout)


def test_the_paths_of_a_workspace_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the printing library, text in brackets or between colons is a style or a picture.

    Nor is any text cut to the width of the terminal, or to the default of 80 columns.
    """
    files = new_files(tmp_path / "[draft]" / "[" / "b]" / ":smile:", tmp_path)
    uri = str(files.workspace / "adapter")
    adapter = {
        "uri": uri,
        "sha256": "a" * 64,
        "sizeBytes": 1,
        "baseModel": "pvc://models/model",
        "baseRevision": "sha256:0",
        "rank": 4,
        "quantization": "nf4",
    }
    ours = {"jobUid": "local", "podUid": "local", "time": "2026-01-02T03:04:05Z", "outcome": "succeeded"}
    done = {**ours, "exitCode": 0, "reason": "Done"}
    results: dict[StepName, ResultRecord] = {
        "train": ResultRecord.model_validate({**done, "step": "train", "trainingStep": 3}),
        "publish": ResultRecord.model_validate({**done, "step": "publish", "adapter": adapter}),
    }
    monkeypatch.setattr("qlora_cli.local.commands.run_steps", lambda *_: Ended(0, None, results))
    shown = CliRunner().invoke(main, arguments(files, manifest(files, SPEC)), env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"Adapter +{re.escape(uri)}\n", shown.output)
    assert re.search(rf"SHA-256 +{'a' * 64}\n", shown.output)
    assert re.search(rf"Report +{re.escape(str(files.workspace / 'report' / 'report.html'))}\n", shown.output)


@pytest.mark.parametrize("leftover", [None, "{", '{"apiVersion": "qlora.dev/v1beta1"}'])
def test_resume_without_a_run_is_rejected(tmp_path: Path, leftover: str | None) -> None:
    records = tmp_path / "work" / "records"
    if leftover is not None:
        records.mkdir(parents=True)
        (records / "job.json").write_text(leftover)
    done = invoked("run", "--resume", "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert f"{tmp_path / 'work'}" in done.stderr
    assert "holds no" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("locations", ["[" * 100_000, "[]", '{"device": "cpu"}', "\x00"])
def test_a_run_whose_locations_cannot_be_read_is_not_resumed(tmp_path: Path, locations: str) -> None:
    records = tmp_path / "work" / "records"
    records.mkdir(parents=True)
    document = {**new_files(tmp_path / "job", tmp_path).document, "metadata": {"name": "tiny"}}
    (records / "job.json").write_text(json.dumps(document))
    (records / "run.json").write_text(locations)
    done = invoked("run", "--resume", "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert done.stderr.startswith(f"Error: {records} holds no readable run: ")
    assert "give FILE instead of --resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_needs_a_manifest_or_an_earlier_run(tmp_path: Path) -> None:
    done = invoked("run", "--workspace", str(tmp_path / "work"))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    both = invoked("run", "--resume", "--restart", "--workspace", str(tmp_path / "work"))
    assert "--restart starts over, and --resume continues" in both.stderr


@pytest.mark.usefixtures("forked")
def test_a_run_whose_output_is_closed_saves_and_ends(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    endless = {**SPEC, "training": {**SPEC["training"], "maxSteps": 100_000}}
    command = arguments(files, manifest(files, endless))
    with ForkedRun(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any("train: training" in line for line in process.stdout)
        process.stdout.close()
        # As click ends a command whose output no process reads: without a message.
        assert process.stderr.read() == ""
    assert process.returncode == 1
    [attempt] = (files.workspace / "records" / "attempts.jsonl").read_text().splitlines()
    assert json.loads(attempt)["ended"] == "interrupted"


def read_until(terminal: int, pattern: str) -> str:
    """Output of the terminal until the pattern appears."""
    shown = ""
    while not re.search(pattern, shown):
        try:
            read = os.read(terminal, 65536)
        except OSError:
            read = b""
        assert read, f"ended without {pattern}: {shown}"
        shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read.decode(errors="replace"))
    return shown


def test_a_run_ends_with_the_exit_code_of_the_step_that_failed(tmp_path: Path, tiny_llama: Path) -> None:
    """The command and its step are started as by a user."""
    files = new_files(tmp_path / "job", tiny_llama.parent)
    shutil.rmtree(files.data)
    files.data.mkdir()
    (files.data / "train.jsonl").write_text("")
    done = qlora(*arguments(files, manifest(files, SPEC)))
    assert done.returncode == 11
    assert "BadDataset" in done.stdout
    assert str(files.workspace / "records" / "prepare.log") in done.stdout
    assert "Training" not in done.stdout


@pytest.mark.usefixtures("forked")
def test_a_changed_run_is_rejected_until_it_is_restarted(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    layout, spec = WorkspaceLayout(files.workspace), merged(SPEC, {"training": {"maxSteps": 2, "evalEverySteps": 1}})
    assert invoked(*arguments(files, manifest(files, spec))).returncode == 0
    first = (layout.adapter / "adapter_model.safetensors").read_bytes()
    changed = arguments(files, manifest(files, merged(spec, {"training": {"learningRate": 0.001}})))

    other = invoked(*changed)
    assert other.returncode == 10
    assert "belongs to another run: training.learningRate was 0.005, is 0.001; " in other.stdout
    shutil.rmtree(layout.checkpoints)
    kept = invoked(*changed)
    assert kept.returncode == 10
    assert f"{layout.adapter} holds another adapter, of job 'tiny'" in kept.stdout
    assert "train: " not in kept.stdout
    assert (layout.adapter / "adapter_model.safetensors").read_bytes() == first

    again = invoked(*changed, "--restart")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Deleted {layout.adapter}\n" in again.stdout
    assert (layout.adapter / "adapter_model.safetensors").read_bytes() != first
    [attempt] = (layout.records / "attempts.jsonl").read_text().splitlines()
    assert json.loads(attempt)["fromStep"] == 0


@pytest.mark.usefixtures("forked")
def test_a_job_with_only_a_model_and_data_runs_with_the_settings_that_are_chosen(
    tmp_path: Path, tiny_llama: Path
) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    spec = {"model": {"source": "pvc://models/model"}, "dataset": {"source": "pvc://data/train.jsonl", "maxRows": 4}}
    done = invoked(*arguments(files, manifest(files, spec)))
    assert done.returncode == 0, done.stdout + done.stderr
    layout = WorkspaceLayout(files.workspace)
    prepared = read_completion(layout.completion("prepare"), PrepareRecord)
    published = read_completion(layout.completion("publish"), PublishRecord)
    assert prepared is not None
    assert published is not None
    chosen = {each.name: each.parsed for each in prepared.settings}
    assert published.adapter.rank == chosen["rank"]
    assert "automatic: maxSequenceLength 128 (" in done.stdout
    changed = {"lora": {"rank": 8}, **spec}
    other = invoked(*arguments(files, manifest(files, changed)))
    assert f"belongs to another run: lora.rank was {chosen['rank']}, is 8; " in other.stdout


@pytest.mark.slow
def test_a_run_whose_answers_are_scored_ends_with_the_share_that_passed(trained: Files) -> None:
    score = {"check": "regex", "pattern": "^", "rows": 2, "maxNewTokens": 2}
    done = qlora(*arguments(trained, manifest(trained, {**SPEC, "gate": {"score": score}})))
    assert done.returncode == 0, done.stdout + done.stderr
    passed = next(line for line in done.stdout.splitlines() if line.startswith("Answers that passed"))
    assert passed.split(maxsplit=3)[3].strip() == "100.0% (100.0% without the adapter, 2 held-out rows)"


@pytest.mark.slow
def test_a_run_whose_adapter_does_not_pass_its_gate_ends_with_the_numbers(trained: Files) -> None:
    done = qlora(*arguments(trained, manifest(trained, {**SPEC, "gate": {"minImprovement": 0.9}})))
    assert done.returncode == 20, done.stdout + done.stderr
    assert "GateFailed: spec.gate.minImprovement is 0.9, and the held-out loss changed by -" in done.stdout
    assert not (trained.workspace / "adapter").exists()
    assert len((trained.workspace / "records" / "attempts.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("installed", "environment", "added"),
    [
        (CPU_ALLOCATOR, {}, {"LD_PRELOAD": CPU_ALLOCATOR}),
        (CPU_ALLOCATOR, {"LD_PRELOAD": "libjemalloc.so.2"}, {}),
        (None, {}, {}),
    ],
)
def test_cpu_training_preloads_the_allocator_unless_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, environment: dict[str, str], added: dict[str, str]
) -> None:
    monkeypatch.setattr("qlora_trainer.core.cpu.find_library", lambda _name: installed)
    assert preloaded_allocator(environment) == added
