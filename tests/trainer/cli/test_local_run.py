"""The user's command line: a manifest's errors, the memory plan, and a local run."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qlora_api.contract import CPU_ALLOCATOR, ResultRecord, WorkspaceLayout
from qlora_api.status import StepName
from qlora_cli.__main__ import main
from qlora_cli.local.run import Ended
from qlora_trainer.core.completion import PublishRecord, read_completion
from qlora_trainer.core.cpu import preloaded_allocator
from tests.support.commands.command import SPEC, Files, new_files, qlora
from tests.support.models.model_configs import LLAMA_3_8B

MANIFEST = """\
apiVersion: qlora.dev/v1alpha1
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

LLAMA_65B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("found", "instead", "error"),
    [
        ("learningRate", "learningRat", "14: spec.training.learningRat: unknown field; did you mean learningRate?"),
        ("maxSteps", "max_steps", "13: spec.training.max_steps: unknown field; did you mean maxSteps?"),
        ("  lora:\n    rank: 8", "  gpus: 2", "10: spec.gpus: unknown field; it is spec.resources.gpus"),
        ("rank: 8", 'rank: "8"', '11: spec.lora.rank: found "8", must be a whole number, without quotes'),
        ("rank: 8", "rank: 0", "11: spec.lora.rank: found 0, must be greater than or equal to 1"),
        ("maxSteps: 3", "maxSteps: 3\n    epochs: 1", "12: spec.training: set only one of epochs and maxSteps"),
        ("maxSteps: 3", "optimizer: adam", "13: spec.training.optimizer: found \"adam\", must be 'paged_adamw_32bit'"),
        (
            "pvc://data/train.jsonl",
            "/data/train.jsonl",
            "9: spec.dataset.source: found '/data/train.jsonl', must be hf",
        ),
        ("    source: pvc://models/model\n", "", "6: spec.model: found null, must be an object"),
        (
            "maxSteps: 3",
            "objective: kto",
            "13: spec.training.objective: found \"kto\", must be 'supervised', 'dpo' or 'orpo'; for these, make pairs",
        ),
        (
            "    source: pvc://data/train.jsonl\n",
            '    source: pvc://data/train.jsonl\n    systemPrompt: {text: " "}\n',
            '10: spec.dataset.systemPrompt.text: found " ", must not be blank',
        ),
        ("kind: QLoRAJob", "kind: Job", '2: kind: found "Job", must be QLoRAJob or QLoRASweep'),
        ("name: tiny", "name: Tiny", '4: metadata.name: found "Tiny", must be lower-case letters, digits and hyphens'),
        ("maxSteps: 3", "maxSteps: 3\n    maxSteps: 4", '14: found duplicate key "maxSteps"'),
        ("maxSteps: 3", "maxSteps: [3", "14: "),
        ("rank: 8", "rank: !small 8", "11: spec.lora.rank: found the tag !small, must be of a type of JSON"),
        ("    learningRate: 2e-4\n", "---\nkind: Secret\n", "15: a second document begins here"),
    ],
)
def test_an_error_in_a_manifest_names_file_line_and_field(tmp_path: Path, found: str, instead: str, error: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(MANIFEST.replace(found, instead))
    done = qlora("plan", str(file))
    assert done.returncode == 10
    assert f"{file}:{error}" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a list\n", "\x00", "{" * 3000])
def test_a_file_that_is_no_manifest_is_rejected_in_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    done = qlora("plan", str(file))
    assert done.returncode == 10
    assert done.stderr.startswith(f"Error: {file}")
    assert "Traceback" not in done.stderr


def test_several_errors_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(MANIFEST.replace("rank", "rnk").replace("maxSteps: 3", "maxSteps: none"))
    lines = qlora("plan", str(file)).stderr.splitlines()
    assert len(lines) == 2


def planned(tmp_path: Path, *arguments: str, training: str = "") -> "subprocess.CompletedProcess[str]":
    """`qlora plan` of an 8B model."""
    (tmp_path / "job.yaml").write_text(MANIFEST + training)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return qlora("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "config.json"), *arguments)


def test_a_plan_adds_up_to_the_expected_peak(tmp_path: Path) -> None:
    done = planned(tmp_path, "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    rows = [re.fullmatch(r"[│|] (.+?) +[│|] +([\d.]+) [│|] (.*?) *[│|]", line) for line in done.stdout.splitlines()]
    sizes = {row[1]: float(row[2]) for row in rows if row and row[3] != "not at the peak"}
    expected = sizes.pop("Expected peak")
    assert sum(sizes.values()) == pytest.approx(expected, abs=0.05)
    assert sizes["Base weights in 4-bit"] == pytest.approx(3.35, abs=0.01)
    assert "fits: the run fits on a GPU of 24 GiB" in done.stdout


def test_a_plan_that_does_not_fit_advises_changes(tmp_path: Path) -> None:
    done = planned(tmp_path, "--gpu-memory", "16", training="    maxSequenceLength: 8192\n    microBatchSize: 4\n")
    assert done.returncode == 17
    assert "exceeds: the run cannot fit on a GPU of 16 GiB" in done.stdout
    assert "spec.training.microBatchSize: 4 → 2" in done.stdout


def test_a_plan_that_barely_fits_reports_the_margin_and_the_first_advice(tmp_path: Path) -> None:
    done = planned(tmp_path, "--gpu-memory", "8", training="    maxSequenceLength: 2048\n")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "fits: the run fits on a GPU of 8 GiB" in said
    assert "GiB are left" in said
    assert re.search(r"To free \d+\.\d\d GiB more, first change: spec\.training\.", said)
    assert "spec.training." in said


def test_the_plan_of_a_65b_job_on_48_gb_names_the_8_bit_optimizer_first(tmp_path: Path) -> None:
    job = MANIFEST.replace("rank: 8", "rank: 64") + "    maxSequenceLength: 512\n"
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_65B))
    done = qlora("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "config.json"), "--gpu-memory", "48")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "tight: the run may fit" in said
    left = re.search(r"on a GPU of 48 GiB: of 47\.04 usable, (\d\.\d\d) GiB are left\.", said)
    assert left
    assert float(left[1]) == pytest.approx(1.3, abs=0.05)
    first = re.search(
        r" 1\. spec\.training\.optimizer: paged_adamw_32bit → paged_adamw_8bit frees (\d\.\d\d) GiB: ", said
    )
    assert first
    assert float(first[1]) == pytest.approx(4.5, abs=0.05)
    assert " 2. spec." not in said


def test_a_plan_without_a_gpus_size_compares_sizes(tmp_path: Path) -> None:
    done = planned(tmp_path)
    assert done.returncode == 0
    assert re.search(r"^ +24  fits$", done.stdout, re.MULTILINE)


def test_a_plan_of_several_nodes_counts_all_gpus_and_names_uneven_batches(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST + "  resources: {gpus: 2, nodes: 3}\n")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_65B | {"num_hidden_layers": 2}))
    done = qlora("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "config.json"))
    said = " ".join(done.stdout.split())
    assert "Each of the 6 GPUs on 3 nodes holds the whole base" in said
    assert "which 6 GPUs cannot share evenly" in said


def test_a_run_of_several_nodes_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST + "  resources: {nodes: 2}\n")
    done = qlora("run", str(tmp_path / "job.yaml"), "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert "spec.resources.nodes is 2, and this command runs a job on one machine" in done.stderr


def test_a_plan_reads_the_configuration_from_a_volume(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST)
    missing = qlora("plan", str(tmp_path / "job.yaml"))
    assert missing.returncode == 10
    assert "--volume models=DIR" in missing.stderr
    assert qlora("plan", str(tmp_path / "job.yaml"), "--volume", f"models={tiny_llama.parent}").returncode == 0


def test_a_plan_of_a_model_that_the_hub_withholds_names_the_alternative(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("pvc://models/model", "hf://acme/tiny"))
    done = qlora("plan", str(tmp_path / "job.yaml"), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == 200
    assert "--config FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_of_an_invalid_repository_name_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("pvc://models/model", "hf://acme/tiny--model"))
    done = qlora("plan", str(tmp_path / "job.yaml"), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == 10
    assert "spec.model.source is hf://acme/tiny--model: " in done.stderr
    assert "Traceback" not in done.stderr


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
    done = qlora("run", str(tmp_path / "job.yaml"), "--workspace", str(tmp_path / "work"))
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
    done = qlora("run", str(manifest), "--workspace", str(work), *volumes)
    assert "spec.continues is first: give the workspace of that run with --continues DIR" in done.stderr
    initial = MANIFEST.replace("    rank: 8\n", "    rank: 8\n    from: {source: pvc://adapters/first}\n")
    manifest.write_text(initial)
    done = qlora("run", str(manifest), "--workspace", str(work), f"--continues={tmp_path}", *volumes[:2])
    assert "spec.lora.from.source is pvc://adapters/first: give a folder for the claim with --volume" in done.stderr
    assert "--continues is for a job that names another one in spec.continues: set that in FILE" in done.stderr
    assert not work.exists()


def test_a_run_shows_a_bar_stops_on_ctrl_c_and_resumes(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    command = arguments(files, manifest(files, SPEC))
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "160", "TERM": "xterm"},
        stdout=end,
        stderr=subprocess.STDOUT,
    )
    os.close(end)
    figures = r"loss \d+\.\d{3}, held-out \d+\.\d{3}, \d+ tokens/s, \S+ left"
    shown = read_until(terminal, rf"Training.*training \d+/30, {figures}")
    process.send_signal(signal.SIGINT)
    shown += read_until(terminal, r"qlora run --resume --workspace \S+")
    assert process.wait(300) == 130
    os.close(terminal)
    assert "━" in shown
    layout = WorkspaceLayout(files.workspace)
    [saved] = layout.checkpoints.glob("step-*")

    done = qlora("run", "--resume", "--workspace", str(files.workspace))
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [json.loads(line) for line in (layout.records / "attempts.jsonl").read_text().splitlines()]
    assert [(attempt["fromStep"], attempt["ended"]) for attempt in attempts] == [
        (0, "interrupted"),
        (int(saved.name.removeprefix("step-")), "succeeded"),
    ]
    assert attempts[1]["fromStep"] > 0
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


@pytest.mark.parametrize("leftover", [None, "{", '{"apiVersion": "qlora.dev/v1alpha1"}'])
def test_resume_without_a_run_is_rejected(tmp_path: Path, leftover: str | None) -> None:
    records = tmp_path / "work" / "records"
    if leftover is not None:
        records.mkdir(parents=True)
        (records / "job.json").write_text(leftover)
    done = qlora("run", "--resume", "--workspace", str(tmp_path / "work"))
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
    done = qlora("run", "--resume", "--workspace", str(tmp_path / "work"))
    assert done.returncode == 10
    assert done.stderr.startswith(f"Error: {records} holds no readable run: ")
    assert "give FILE instead of --resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_needs_a_manifest_or_an_earlier_run(tmp_path: Path) -> None:
    done = qlora("run", "--workspace", str(tmp_path / "work"))
    assert done.returncode == 2
    assert "--resume" in done.stderr


def test_a_run_whose_output_is_closed_saves_and_ends(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "job", tiny_llama.parent)
    command = arguments(files, manifest(files, {**SPEC, "training": {**SPEC["training"], "maxSteps": 100_000}}))
    command = [sys.executable, "-m", "qlora_cli", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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
    files = new_files(tmp_path / "job", tiny_llama.parent)
    shutil.rmtree(files.data)
    files.data.mkdir()
    (files.data / "train.jsonl").write_text("")
    done = qlora(*arguments(files, manifest(files, SPEC)))
    assert done.returncode == 11
    assert "BadDataset" in done.stdout
    assert str(files.workspace / "records" / "prepare.log") in done.stdout
    assert "Training" not in done.stdout


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


STARCODER_3B = {
    "model_type": "starcoder2",
    "hidden_size": 3072,
    "num_hidden_layers": 2,
    "intermediate_size": 12288,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def test_a_plan_of_a_model_whose_layers_are_not_listed_is_from_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST)
    (tmp_path / "model.json").write_text(json.dumps(STARCODER_3B))
    done = qlora("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "model.json"), "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    assert "fits: the run fits on a GPU of 24 GiB" in done.stdout
    assert "spec.training.microBatchSize: 1 → 8" in done.stdout


def test_a_plan_of_an_unsupported_model_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    done = qlora("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "config.json"))
    assert done.returncode == 10
    assert "encoder-decoder" in done.stderr
