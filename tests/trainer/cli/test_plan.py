"""The user's command line plans a job: a manifest's errors, and the memory that training needs."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qlora_trainer.model.source import hub_config
from tests.support.commands.command import MANIFEST, invoked, qlora
from tests.support.models.model_configs import LLAMA_3_8B

# A dry run of all 32 takes thirty times as long.
ONE_BLOCK = LLAMA_3_8B | {"num_hidden_layers": 1, "max_position_embeddings": 8192}
LLAMA_65B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "vocab_size": 32000,
}

LLAMA_70B = LLAMA_65B | {"intermediate_size": 28672, "num_key_value_heads": 8, "vocab_size": 128_256}
SHARDED = "rank: 16\n    dtype: bfloat16"


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
        ("rank: 8", "rank: !small 8", "11: spec.lora.rank: found the tag !small, must be of a type of JSON"),
        ("    learningRate: 2e-4\n", "---\nkind: Secret\n", "15: a second document begins here"),
    ],
)
def test_an_error_in_a_manifest_names_file_line_and_field(tmp_path: Path, found: str, instead: str, error: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(MANIFEST.replace(found, instead))
    done = invoked("plan", str(file))
    assert done.returncode == 10
    assert f"{file}:{error}" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a list\n", "\x00", "{" * 1000])
def test_a_file_that_is_no_manifest_is_rejected_in_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    done = invoked("plan", str(file))
    assert done.returncode == 10
    assert done.stderr.startswith(f"Error: {file}")
    assert "Traceback" not in done.stderr


def test_several_errors_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(MANIFEST.replace("rank", "rnk").replace("maxSteps: 3", "maxSteps: none"))
    lines = invoked("plan", str(file)).stderr.splitlines()
    assert len(lines) == 2


def planned(
    tmp_path: Path,
    *arguments: str,
    manifest: str = MANIFEST,
    config: dict[str, Any] = ONE_BLOCK,
    command: Callable[..., "subprocess.CompletedProcess[str]"] = invoked,
) -> "subprocess.CompletedProcess[str]":
    """`qlora plan` of a model."""
    (tmp_path / "job.yaml").write_text(manifest)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return command("plan", str(tmp_path / "job.yaml"), "--config", str(tmp_path / "config.json"), *arguments)


def test_a_plan_adds_up_to_the_expected_peak(tmp_path: Path) -> None:
    done = planned(tmp_path, "--gpu-memory", "24Gi", command=qlora)
    assert (done.returncode, done.stderr) == (0, ""), "no warnings of libraries either"
    rows = [re.fullmatch(r"[│|] (.+?) +[│|] +([\d.]+) [│|] (.*?) *[│|]", line) for line in done.stdout.splitlines()]
    sizes = {row[1]: float(row[2]) for row in rows if row and row[3] != "not at the peak"}
    expected = sizes.pop("Expected peak")
    assert sum(sizes.values()) == pytest.approx(expected, abs=0.05)
    assert sizes["Base weights in 4-bit"] == pytest.approx(0.10, abs=0.01)
    assert "fits: the run fits on a GPU of 24 GiB" in done.stdout


def test_a_plan_that_does_not_fit_advises_changes(tmp_path: Path) -> None:
    done = planned(
        tmp_path, "--gpu-memory", "7Gi", manifest=MANIFEST + "    maxSequenceLength: 8192\n    microBatchSize: 4\n"
    )
    assert done.returncode == 17
    assert "exceeds: the run cannot fit on a GPU of 7 GiB" in done.stdout
    assert "spec.training.microBatchSize: 4 → 2" in done.stdout


def test_a_plan_that_barely_fits_reports_the_margin_and_the_first_advice(tmp_path: Path) -> None:
    done = planned(tmp_path, "--gpu-memory", "4Gi", manifest=MANIFEST + "    maxSequenceLength: 4352\n")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "fits: the run fits on a GPU of 4 GiB" in said
    assert "GiB are left" in said
    assert re.search(r"To free \d+\.\d\d GiB more, first change: spec\.training\.", said)
    assert "spec.training." in said


@pytest.mark.slow
def test_the_plan_of_a_65b_job_on_48_gb_names_the_8_bit_optimizer_first(tmp_path: Path) -> None:
    job = MANIFEST.replace("rank: 8", "rank: 64") + "    maxSequenceLength: 512\n"
    done = planned(tmp_path, "--gpu-memory", "48Gi", manifest=job, config=LLAMA_65B)
    assert done.returncode == 3, done.stderr
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "config", "settings", "left"),
    [
        ("l40s", LLAMA_65B, "rank: 64", "44.09 usable, 1.63 GiB are missing"),
        ("4090", LLAMA_70B, SHARDED, "23.51 usable, 0.80 GiB are left"),
        ("l4", LLAMA_70B, SHARDED, "22.04 usable, 0.66 GiB are missing"),
    ],
)
def test_the_page_of_measurements_has_what_large_models_lack(
    tmp_path: Path, gpu: str, config: dict[str, Any], settings: str, left: str
) -> None:
    job = MANIFEST.replace("rank: 8", settings) + "    maxSequenceLength: 512\n"
    if config is LLAMA_70B:
        job += "    optimizer: paged_adamw_8bit\n    sharding: full\n  resources: {gpus: 2}\n"
    done = planned(tmp_path, "--gpu", gpu, manifest=job, config=config)
    assert done.returncode == 3, done.stderr
    assert left in " ".join(done.stdout.split())


def test_a_plan_without_a_gpus_size_compares_sizes(tmp_path: Path) -> None:
    done = planned(tmp_path)
    assert done.returncode == 0
    assert re.search(r"^  l4 +22\.5 GiB  fits$", done.stdout, re.MULTILINE)


def test_a_plan_of_several_nodes_counts_all_gpus_and_names_uneven_batches(tmp_path: Path) -> None:
    job = MANIFEST + "    gradientAccumulationSteps: 16\n  resources: {gpus: 2, nodes: 3}\n"
    done = planned(tmp_path, manifest=job, config=LLAMA_65B | {"num_hidden_layers": 2})
    said = " ".join(done.stdout.split())
    assert "Each of the 6 GPUs on 3 nodes holds the whole base" in said
    assert "which 6 GPUs cannot share evenly" in said


def test_a_plan_reads_the_configuration_from_a_volume(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST)
    missing = invoked("plan", str(tmp_path / "job.yaml"))
    assert missing.returncode == 10
    assert "--volume models=DIR" in missing.stderr
    assert invoked("plan", str(tmp_path / "job.yaml"), "--volume", f"models={tiny_llama.parent}").returncode == 0


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("hf://acme/tiny", 200, "--config FILE"),
        ("hf://acme/tiny--model", 10, "spec.model.source is hf://acme/tiny--model: "),
    ],
    ids=["a hub that does not answer", "an invalid name"],
)
def test_a_plan_of_a_model_that_the_hub_withholds_names_the_reason(
    tmp_path: Path, model: str, code: int, words: str
) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("pvc://models/model", model))
    done = qlora("plan", str(tmp_path / "job.yaml"), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, "the hub's client tries again, and reports each time"


def test_a_plan_reads_a_configuration_that_the_hubs_client_has_kept(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("pvc://models/model", "hf://acme/tiny"))
    kept = tmp_path / "hub" / "models--acme--tiny"
    commit = "0" * 40
    (kept / "snapshots" / commit).mkdir(parents=True)
    (kept / "snapshots" / commit / "config.json").write_text(json.dumps(ONE_BLOCK))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = qlora("plan", str(tmp_path / "job.yaml"), "--gpu", "l4", **hub)
    assert done.returncode == 0, done.stderr
    assert "fits: the run fits on a GPU of 22.5 GiB" in done.stdout


PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "choose-a-model.md"


def test_a_plan_without_a_network_has_the_figure_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows are those of a dry run; see tests/trainer/model/memory/test_measure.py."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_config, "hub_answers", lambda *_: False)
    page, model = PAGE.read_text(), "meta-llama/Llama-3.2-1B-Instruct"
    [manifest] = re.findall(r"```yaml\n(apiVersion: .*?)```", page, re.DOTALL)
    (tmp_path / "job.yaml").write_text(re.sub(r"hf://[^\s}]+", f"hf://{model}", manifest))
    done = invoked("plan", str(tmp_path / "job.yaml"))
    assert done.returncode == 0, done.stderr
    assert f"config of {model} as packaged with this release; the Hub cannot be reached" in done.stdout
    peak = re.search(r"Expected peak +[│|] +([\d.]+)", done.stdout)
    assert peak
    [tokens] = re.findall(r"maxSequenceLength: (\d+)", manifest)
    header, row = re.findall(rf"^\| (Model|`{model}`) \| (.+) \|$", page, re.MULTILINE)
    column = header[1].split(" | ").index(f"{int(tokens):,} tokens")
    assert row[1].split(" | ")[column].startswith(f"{float(peak[1]):.1f}, ")


STARCODER_3B = {
    "model_type": "starcoder2",
    "hidden_size": 3072,
    "num_hidden_layers": 1,
    "intermediate_size": 12288,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def test_a_plan_of_a_model_whose_layers_are_not_listed_is_from_a_dry_run(tmp_path: Path) -> None:
    job = MANIFEST + "    microBatchSize: 1\n    maxSequenceLength: 512\n"
    done = planned(tmp_path, "--gpu-memory", "24Gi", manifest=job, config=STARCODER_3B)
    assert done.returncode == 0, done.stderr
    assert "fits: the run fits on a GPU of 24 GiB" in done.stdout
    assert "spec.training.microBatchSize: 1 → 8" in done.stdout


HELIUM = {"architectures": ["HeliumForCausalLM"], "model_type": "helium", "head_dim": 128}


def test_a_plan_rejects_a_model_that_the_converter_to_gguf_does_not_support(tmp_path: Path) -> None:
    job = MANIFEST + "  output: {gguf: {}}\n"
    done = planned(tmp_path, manifest=job, config=ONE_BLOCK | HELIUM)
    assert done.returncode == 10
    assert "HeliumForCausalLM is not supported; remove output.gguf" in done.stderr


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "gemma4"}, "hidden_size, num_hidden_layers, "),
        ({name: size for name, size in ONE_BLOCK.items() if name != "vocab_size"}, "vocab_size is missing"),
        (ONE_BLOCK | {"max_position_embeddings": 64}, "has positions for 64 tokens"),
    ],
)
def test_a_plan_rejects_a_model_as_prepare_does(tmp_path: Path, config: dict[str, Any], error: str) -> None:
    done = planned(tmp_path, manifest=MANIFEST + "    maxSequenceLength: 512\n", config=config)
    assert done.returncode == 10
    assert error in done.stderr
