"""Output of publish for people, PEFT and servers, its rejections, and clean."""

import csv
import html
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_api.contract import ExitCode, ProgressRecord, decode_record
from qlora_trainer.core.completion import TrainRecord, read_completion, write_completion
from qlora_trainer.report.serving import ADAPTER_PLACEHOLDER, BASE_PLACEHOLDER
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.contents import Manifest, describe_files
from qlora_trainer.stores.destinations.volume import VolumeFolder
from tests.support.commands.command import ROWS, Files
from tests.support.failures import failing
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded
from tests.support.runs.published import MANIFEST, published
from tests.support.runs.report_page import Page
from tests.trainer.conftest import MakeContext

OTHER_UID = "7d0c2f5e-0000-4000-8000-00000000000f"


def rejected(files: Files, code: ExitCode, *words: str, uid: str = JOB_UID) -> None:
    """Check that publish fails with these words, and leaves no record of a success."""
    with failing(code) as failure:
        published(files, uid=uid)
    for word in words:
        assert word in failure.value.message
    assert not (files.workspace / "records" / "publish.json").exists()


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_reports_the_published_adapter(finished: Files) -> None:
    *earlier, last = (finished.root / "publish.stdout").read_text().splitlines()
    for line in earlier:
        assert isinstance(decode_record(line, job_uid=JOB_UID, pod_uid=POD_UID), ProgressRecord)
    adapter = json.loads(last)["adapter"]
    file = finished.workspace / "adapter" / "adapter_model.safetensors"
    assert adapter == {
        "uri": str(finished.workspace / "adapter"),
        "sha256": sha256(file.read_bytes()).hexdigest(),
        "sizeBytes": file.stat().st_size,
        "baseModel": "pvc://models/model",
        "baseRevision": adapter["baseRevision"],
        "rank": 4,
        "step": 30,
        "servedRank": 8,
        "quantization": "nf4 with double quantization",
        "lineage": "unsigned",
    }
    assert adapter["baseRevision"].startswith("sha256:")


def test_an_adapter_that_learned_little_is_published_with_that_remark(trained: Files) -> None:
    path = trained.workspace / "records" / "train.json"
    record = read_completion(path, TrainRecord)
    assert record is not None
    write_completion(path, record.model_copy(update={"initial_eval_loss": 5.12, "eval_loss": 5.08}))
    remark = "learned little: loss 5.12 to 5.08"
    adapter = published(trained).adapter
    assert adapter.remark == remark
    assert f"\nThe adapter {remark}.\n" in (trained.workspace / "adapter" / "README.md").read_text()
    words = Page((trained.workspace / "adapter" / "report.html").read_text()).words
    assert f"Note: the adapter {remark}." in words
    assert "Note: the run makes 30 optimizer steps" in words


def test_libraries_print_into_the_log_of_the_step(finished: Files) -> None:
    records = finished.workspace / "records"
    for step in ("prepare", "train", "publish"):
        assert (records / f"{step}.log").read_text().splitlines()[0].endswith(f"{step}, attempt 1, pod {POD_UID}")
    assert "paging needs a GPU" in (records / "train.log").read_text()


def loss_of(model: Any, tokenizer: Any) -> float:
    """Mean loss on the answers of the job's rows, by transformers' own formula."""
    losses = []
    for row in ROWS[:8]:
        question = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = tokenizer(text, return_tensors="pt").input_ids
        labels = tokens.clone()
        labels[:, : len(tokenizer(question).input_ids)] = -100
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=labels).loss))
    return sum(losses) / len(losses)


def test_the_adapter_loads_with_plain_peft_on_an_nf4_base_and_lowers_the_loss(finished: Files) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(finished.models / "model", quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(finished.workspace / "adapter")
    before = loss_of(base, tokenizer)
    model = PeftModel.from_pretrained(base, finished.workspace / "adapter")
    after = loss_of(model, tokenizer)
    assert after < 0.9 * before
    with model.disable_adapter():
        assert loss_of(model, tokenizer) == pytest.approx(before, rel=1e-3)


def test_the_auto_classes_load_the_folder_by_the_bases_name(finished: Files, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.workspace / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pvc://models/model"
    # In place of a name on the Hub.
    config["base_model_name_or_path"] = str(finished.models / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    after = loss_of(model, tokenizer)
    with model.disable_adapter():
        assert after < 0.9 * loss_of(model, tokenizer)


def test_the_reports_program_for_peft_runs_as_it_is_printed(
    finished: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (finished.workspace / "report" / "report.html").read_text()
    program = html.unescape(page.partition('<p class="quiet">PEFT</p>\n<pre>')[2].partition("</pre>")[0])
    paths = {BASE_PLACEHOLDER: finished.models / "model", ADAPTER_PLACEHOLDER: finished.workspace / "adapter"}
    for placeholder, path in paths.items():
        assert placeholder in program
        program = program.replace(placeholder, str(path))
    names: dict[str, Any] = {}
    exec(compile(program, "report.html", "exec"), names)
    assert capsys.readouterr().out.strip(), "the answer"
    model, tokenizer = names["model"], names["tokenizer"]
    after = loss_of(model, tokenizer)
    with model.disable_adapter():
        assert after < 0.9 * loss_of(model, tokenizer)


def test_the_folder_describes_itself(finished: Files) -> None:
    folder = finished.workspace / "adapter"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["jobUid"] == JOB_UID
    assert manifest["libraries"]["torch"] == torch.__version__.partition("+")[0]
    described = {name: (file["sha256"], file["size"]) for name, file in manifest["files"].items()}
    assert described == {
        path.name: (sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    assert set(described) == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md"),
        *("loss.png", "metrics.csv", "report.html", "lineage.intoto.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }

    model_card = ModelCard.load(folder / "README.md")
    assert (model_card.data.library_name, model_card.data.pipeline_tag) == ("peft", "text-generation")
    assert "--max-lora-rank 8" in model_card.text
    assert 'bnb_4bit_quant_type="nf4"' in model_card.text
    assert "30 of 41 rows" in model_card.text
    words = " ".join(model_card.text.split())
    assert "1 were left out because they are longer than 64 tokens." in words
    base = (
        "the base in nf4 with double quantization, with the weights that are loaded above: serve it on these to get "
        "the same answers"
    )
    assert f"The losses above were measured with the adapter on {base}" in words
    assert "No loss was measured on the original 16-bit base, which the command below serves: measure on that" in words
    assert "names the base as `pvc://models/model`, which no library can load: give the base's own folder." in words
    assert "{{" not in model_card.text
    assert str(finished.root) not in model_card.content


def test_the_model_card_of_an_adapter_for_a_hub_model_names_its_commit(trained: Files) -> None:
    files = trained.with_spec({"model": {"source": "hf://acme/tiny"}})
    config = files.workspace / "trained" / "adapter_config.json"
    config.write_text(config.read_text().replace("pvc://models/model", "acme/tiny"))
    published(files)
    model_card = ModelCard.load(files.workspace / "adapter" / "README.md")
    assert model_card.data.base_model == "acme/tiny"
    assert "`AutoPeftModelForCausalLM.from_pretrained` loads base and adapter" in model_card.text
    assert "vllm serve acme/tiny --revision sha256:" in model_card.text


def test_the_report_shows_the_run(finished: Files) -> None:
    report = finished.workspace / "report"
    picture = (report / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1440, 810)
    summary = json.loads((report / "summary.json").read_text())
    metrics = [json.loads(line) for line in (report / "metrics.jsonl").read_text().splitlines()]
    evaluations = [entry["evalLoss"] for entry in metrics if "evalLoss" in entry]
    assert (summary["loss"]["heldOutBefore"], summary["loss"]["heldOutAfter"]) == (evaluations[0], evaluations[-1])
    assert summary["loss"]["heldOutAfter"] < summary["loss"]["heldOutBefore"]
    assert summary["optimizerSteps"] == 30
    assert summary["memory"]["peakBytes"] > 0
    assert summary["dataset"]["usedRows"] == 30


def test_the_metrics_of_each_step_are_beside_the_adapter_as_a_table(finished: Files) -> None:
    lines = (finished.workspace / "report" / "metrics.jsonl").read_text().splitlines()
    measured: dict[int, dict[str, float]] = {}
    for entry in map(json.loads, lines):
        measured.setdefault(entry["step"], {}).update(entry)
    folder = finished.workspace / "adapter"
    with (folder / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    names = {"train_loss": "loss", "valid_loss": "evalLoss", "learning_rate": "learningRate", "grad_norm": "gradNorm"}
    assert list(table[0]) == [
        *("step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate", "grad_norm"),
    ]
    assert [int(line["step"]) for line in table] == sorted(measured) == list(range(31))
    for line in table:
        found = {key: float(line[name]) for name, key in names.items() if line[name]}
        assert found == {key: value for key, value in measured[int(line["step"])].items() if key in names.values()}
        assert (line["train_accuracy"], line["valid_accuracy"]) == ("", "")
    assert (table[0]["train_loss"], table[0]["valid_loss"] != "") == ("", True)
    statement = json.loads((folder / "lineage.intoto.json").read_text())
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert digests["metrics.csv"] == sha256((folder / "metrics.csv").read_bytes()).hexdigest()


def test_the_published_page_shows_rows_of_the_data_only_with_report_full(trained: Files) -> None:
    prompt = "List the pods of namespace"
    assert prompt in (trained.workspace / "report" / "samples.json").read_text()
    record = published(trained)
    page = (trained.workspace / "adapter" / "report.html").read_bytes()
    assert record.report_sha256 == sha256(page).hexdigest()
    assert b"Held-out loss" in page
    assert prompt.encode() not in page
    assert prompt in (trained.workspace / "report" / "report.html").read_text()

    for wanted, has in (("full", True), ("none", False)):
        shutil.rmtree(trained.workspace / "adapter")
        shown = published(trained.with_spec({"output": {"report": wanted}}))
        found = (trained.workspace / "adapter" / "report.html").exists()
        assert (found, shown.report_sha256 is not None) == (has, has)
        if has:
            assert prompt.encode() in (trained.workspace / "adapter" / "report.html").read_bytes()


def test_publishing_again_changes_nothing(trained: Files) -> None:
    first = published(trained)
    folder = trained.workspace / "adapter"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (trained.workspace / "records" / "publish.json").unlink()
    assert published(trained) == first
    shutil.rmtree(trained.workspace / "trained")
    assert published(trained) == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_damaged_or_half_written_publication_is_repaired(trained: Files) -> None:
    published(trained)
    folder = trained.workspace / "adapter"
    whole = content(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    leftover = folder.with_name(f".adapter.{JOB_UID}.killed-pod.partial")
    leftover.mkdir()
    published(trained)
    assert content(folder) == whole
    assert [path.name for path in trained.workspace.iterdir() if path.name.startswith(".")] == []


def to(files: Files, destination: str) -> Files:
    """The job with a destination on the claim `data`."""
    return files.with_spec({"output": {"destination": destination}})


def test_a_destination_on_another_claim_gets_the_same_files(trained: Files, finished: Files) -> None:
    record = published(to(trained, "pvc://data/team/adapters/tiny"))
    assert record.adapter.uri == "pvc://data/team/adapters/tiny"
    folder = trained.data / "team" / "adapters" / "tiny"
    same = ("adapter_model.safetensors", "adapter_config.json", "loss.png", "metrics.csv")
    expected, found = content(finished.workspace / "adapter"), content(folder)
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert not (trained.workspace / "adapter").exists()


def test_the_adapter_of_a_job_that_was_faster_is_never_replaced(tmp_path: Path) -> None:
    """Both jobs found the folder free; the other one ends while this one still copies."""
    manifests = [
        Manifest(
            job_uid=uid,
            job_name=uid,
            fingerprint="a" * 64,
            spec_sha256="b" * 64,
            base_model="hf://acme/tiny",
            base_revision="c0ffee",
            libraries={},
            files=describe_files({"README.md": uid.encode()}),
        )
        for uid in ("slow", "fast")
    ]
    slow, fast = (VolumeFolder(tmp_path / "adapter", "pvc://data/adapter", owner=uid) for uid in ("slow", "fast"))

    class Overtaken(dict[str, bytes]):
        def items(self) -> Any:
            fast.write({"README.md": b"fast"}, manifests[1])
            return super().items()

    with failing(ExitCode.BAD_CONFIGURATION, match="pvc://data/adapter holds another adapter, of job 'fast'"):
        slow.write(Overtaken({"README.md": b"slow"}), manifests[0])
    assert (tmp_path / "adapter" / "README.md").read_bytes() == b"fast"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_folder_is_replaced_after_an_attempt_was_killed_at_its_end(tmp_path: Path) -> None:
    contents = {"README.md": b"# Tiny\n"}
    manifest = MANIFEST.model_copy(update={"files": describe_files(contents)})
    destination = VolumeFolder(tmp_path / "adapter", "pvc://data/adapter", owner="local")
    destination.write(contents, manifest)
    left = tmp_path / f".adapter.{manifest.job_uid}.local.replaced.partial"
    shutil.copytree(tmp_path / "adapter", left)
    (tmp_path / "adapter" / "README.md").write_bytes(b"damaged")
    destination.write(contents, manifest)
    assert destination.find_damage(manifest) is None
    assert os.listdir(tmp_path) == ["adapter"]


def test_foreign_files_are_never_replaced(trained: Files) -> None:
    (trained.data / "precious").mkdir()
    (trained.data / "precious" / "thesis.tex").write_text("years of work")
    rejected(to(trained, "pvc://data/precious"), ExitCode.BAD_CONFIGURATION, "no QLoRAJob published")
    rejected(to(trained, "pvc://data/train.jsonl"), ExitCode.BAD_CONFIGURATION, "no QLoRAJob published")
    assert os.listdir(trained.data / "precious") == ["thesis.tex"]


def test_a_foreign_folder_is_rejected_before_training(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "data" / "precious").mkdir(parents=True)
    (tmp_path / "data" / "precious" / "thesis.tex").write_text("years of work")
    for output in ({"destination": "pvc://data/precious"}, {"merged": {"destination": "pvc://data/precious"}}):
        with failing(ExitCode.BAD_CONFIGURATION, match="pvc://data/precious has files that no QLoRAJob published"):
            prepare(make_context({"output": output}), Recorded())


def test_an_empty_folder_is_a_free_destination(trained: Files) -> None:
    (trained.data / "empty").mkdir()
    published(to(trained, "pvc://data/empty"))
    assert (trained.data / "empty" / "adapter_model.safetensors").is_file()


def test_a_link_that_leads_out_of_the_volume_is_rejected(trained: Files, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (trained.data / "link").symlink_to(tmp_path / "outside")
    rejected(to(trained, "pvc://data/link/adapter"), ExitCode.UNSAFE_ARTIFACT, "outside of its volume")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_claim_that_is_not_mounted_is_no_destination(trained: Files) -> None:
    rejected(to(trained, "pvc://elsewhere/adapter"), ExitCode.UNREACHABLE, "'elsewhere' is not mounted")
