"""The report: a person's view of a run in a browser, on one self-contained page."""

import csv
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import MemoryStatus
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.statistics import DataStatistics, OverlapStatistics
from qlora_trainer.history.metrics_log import Curve, MetricsHistory, read_history
from qlora_trainer.history.samples import Sample, Samples
from qlora_trainer.report.charts import chart, loss_chart, loss_picture
from qlora_trainer.report.model_card import adapter_model_card
from qlora_trainer.report.page import estimated_peaks
from qlora_trainer.steps.publish import publish
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID, Recorded
from tests.support.resolved import resolved_spec
from tests.support.runs.published import context, published
from tests.support.runs.report_page import Page


def page_of(files: Files) -> str:
    return (files.workspace / "report" / "report.html").read_text()


def test_the_page_shows_the_run_and_is_self_contained(finished: Files) -> None:
    source = page_of(finished)
    page = Page(source)
    assert page.open == []
    assert all(address.startswith("#") for address in page.fetched)
    assert "url(http" not in source
    assert "@import" not in source
    assert "script" not in page.elements
    assert page.elements.count("svg") == 6  # loss, rate, norm, memory, speed, lengths
    metrics = read_history(finished.workspace / "report" / "metrics.jsonl")
    for shown in (
        f"{metrics.evaluation.values[-1]:.4f}",
        f"{metrics.evaluation.values[0]:.4f} before training",
        "41 read, 30 trained on, 10 held out",
        "Left out 1 longer than 64 tokens (spec.training.maxSequenceLength)",
        "% without padding",
        "stored in 4-bit",
        "--max-lora-rank 8",
        "PeftModel.from_pretrained",
        "learningRate 0.005",
        "Answer in the data",
        "processor hours: 1 attempt on 1 processor",
        "0 trained to its end 0s",
    ):
        assert shown in page.words, shown


def test_the_page_states_base_and_rank_for_serving_the_adapter(finished: Files) -> None:
    words = Page(page_of(finished)).words
    trained_on = "The adapter was trained on the base model in nf4 with double quantization"
    assert f"{trained_on}, and its loss was measured on that base: load it on the same 4-bit base" in words
    rank = "This adapter has rank 4, so --max-lora-rank must be at least 8: vLLM accepts only certain values"
    assert f"{rank}, and its default is 16." in words


def test_the_picture_of_the_loss_has_a_point_for_each_evaluation(finished: Files) -> None:
    evaluations = read_history(finished.workspace / "report" / "metrics.jsonl").evaluation
    assert evaluations.steps == (0, 10, 20, 30)
    source = page_of(finished)
    picture = source[source.index("<svg") : source.index("</svg>")]
    texts = [text.strip() for text in Page(picture).text]
    assert "held-out rows" in texts
    assert f"{evaluations.values[0]:.3f}" in texts
    assert f"{evaluations.values[-1]:.3f}" in texts
    points = re.findall(r"<use [^>]*fill: #d9480f", picture)
    assert len(points) == len(evaluations.steps) + 1  # and one in the legend


def test_the_page_shows_the_bytes_of_each_kind_of_layer(finished: Files) -> None:
    words = Page(page_of(finished)).words
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (32, 64),
        "v_proj": (32, 64),
        "o_proj": (64, 64),
        "gate_proj": (128, 64),
        "up_proj": (128, 64),
        "down_proj": (64, 128),
    }
    for name, (outputs, inputs) in shapes.items():
        weights = outputs * inputs
        # Two weights per byte; a byte per 64 weights; a mean and a scale for all those; tables of 16 and 256 values.
        stored = weights // 2 + weights // 64 + 4 + 4 + 16 * 4 + 256 * 4
        row = f"{name} 2 {outputs} × {inputs} {stored:,} {8 * stored / weights:.3f}"
        assert row in words, row


def test_the_samples_match_the_answers_of_plain_peft(finished: Files) -> None:
    samples = Samples.model_validate_json((finished.workspace / "report" / "samples.json").read_bytes())
    assert len(samples.samples) == 1
    sample = samples.samples[0]
    folder = finished.models / "model"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation="eager"
    )
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # computes in another order, with other roundings
    model = PeftModel.from_pretrained(base, finished.workspace / "adapter", autocast_adapter_dtype=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(sample.prompt, return_tensors="pt")

    def answer() -> str:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.generate(**tokens, max_new_tokens=64, do_sample=False)
        return str(tokenizer.decode(output[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))

    assert answer() == sample.after
    with model.disable_adapter():
        assert answer() == sample.before
    assert sample.after != sample.before


def test_text_of_users_and_data_cannot_become_markup(trained: Files) -> None:
    attack = "</pre><script>alert(1)</script><svg onload=alert(2)>"
    samples = Samples(samples=(Sample(prompt=attack, reference=attack, before=attack, after=attack),))
    (trained.workspace / "report" / "samples.json").write_text(json.dumps(samples.dump()))
    published(trained)
    page = Page(page_of(trained))
    assert "script" not in page.elements
    assert page.elements.count("svg") == 6
    assert page.words.count(attack) == 4


def test_a_report_without_samples_states_why(trained: Files) -> None:
    (trained.workspace / "report" / "samples.json").unlink()
    published(trained)
    assert "No samples: training did not write any." in Page(page_of(trained)).words


def test_the_page_of_a_run_that_compared_answers_shows_rewards_and_accuracy(trained: Files) -> None:
    metrics = trained.workspace / "report" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        share = line["step"] / lines[-1]["step"]
        if "loss" in line:
            line |= {"rewardMargin": share, "chosenReward": share / 2, "rejectedReward": -share / 2, "accuracy": share}
        else:
            line |= {"evalAccuracy": 0.5 + 0.4 * share}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    published(trained)
    source = page_of(trained)
    page = Page(source)
    assert page.elements.count("svg") == 9  # and accuracy, margin, reward
    assert "Held-out accuracy 90.0% 50.0% before training" in page.words
    assert "Loss per pair (nats)" in source
    summary = json.loads((trained.workspace / "report" / "summary.json").read_text())
    assert summary["preference"] == {
        "rewardMargin": 1.0,
        "accuracy": 1.0,
        "heldOutAccuracyBefore": 0.5,
        "heldOutAccuracyAfter": 0.9,
    }
    *_, last = csv.DictReader((trained.workspace / "adapter" / "metrics.csv").read_text().splitlines())
    assert (last["train_accuracy"], last["valid_accuracy"]) == ("1.0", "0.9")


def test_page_card_and_summary_name_equal_rows_and_the_continued_run(trained: Files) -> None:
    path = trained.workspace / "records" / "prepare.json"
    record = read_completion(path, PrepareRecord)
    assert record is not None
    found = record.dataset.model_copy(update={"duplicate_rows": 3, "overlap_rows": 2})
    write_completion(path, record.model_copy(update={"dataset": found, "continued_step": 4}))
    folder = trained.workspace / record.data_path
    overlap = OverlapStatistics(rows=2, left_out=False, first="a.jsonl line 3", held_out="b.jsonl line 1")
    DataStatistics.read(folder).model_copy(update={"overlap": overlap, "epochs": 5}).write(folder)
    published(trained.with_spec({"dataset": {"deduplicate": True}, "continues": "earlier"}))
    words = Page(page_of(trained)).words
    for shown in (
        "Duplicates 3 rows, left out",
        "Overlap 2 rows for training are also held out: the first, a.jsonl line 3, is equal to b.jsonl line 1; trained",
        "Epochs drawn 5",
        "Trained on completions only",
        "Continues the run of job earlier step 4",
    ):
        assert shown in words, shown
    card = (trained.workspace / "adapter" / "README.md").read_text()
    assert "\n3 rows are duplicates of others, and were left out.\n" in card
    assert "2 rows for training are also held out, token for token; they were trained on, which lowers the" in card
    assert "| Continues | the run of `earlier` from step 4 |\n| Optimizer steps |" in card
    summary = json.loads((trained.workspace / "report" / "summary.json").read_text())
    assert summary["continues"] == {"job": "earlier", "step": 4}


def test_the_page_of_a_mix_has_dropped_rows_and_lengths_by_source(trained: Files) -> None:
    record = read_completion(trained.workspace / "records" / "prepare.json", PrepareRecord)
    assert record is not None
    folder = trained.workspace / record.data_path
    statistics = DataStatistics.read(folder)
    found = statistics.sources[0]
    names = [f"pvc://data/{name}.jsonl" for name in ("many", "few", "held-out")]
    many, few, own = (found.model_copy(update={"uri": name}) for name in names)
    drawn = {"epoch_rows": 30, "epoch_tokens": 1005}
    sources = many.model_copy(update=drawn), few.model_copy(update=drawn | {"dropped": ()}), own
    statistics.model_copy(update={"sources": sources, "epochs": 5}).write(folder)
    mix = [{"source": name} for name in names[:2]]
    published(
        trained.with_spec({"dataset": {"source": None, "mix": mix, "eval": {"source": names[2], "fraction": None}}})
    )
    words = Page(page_of(trained)).words
    one = "1 longer than 64 tokens (spec.training.maxSequenceLength) of pvc://data"
    assert f"Left out {one}/many.jsonl; {one}/held-out.jsonl (held out) " in words
    # Of the rows of an epoch: the mean of all rows counts those that are left out.
    assert "1,005 33.5 " in words


SMOOTHED = {"objective": "dpo", "preference": {"beta": 0.3, "labelSmoothing": 0.1}}


@pytest.mark.parametrize(
    ("training", "sentences"),
    [
        ({}, ["averaged over the target tokens.", "The loss was computed on completions only.\n"]),
        (
            {"objective": "orpo"},
            [
                "averaged over the pairs of answers.",
                (
                    "The objective was orpo with beta 0.1; losses are means over pairs of answers.\n"
                    "Of the held-out pairs 90.0 % have the higher reward for the chosen answer, "
                    "before training 50.0 %.\n"
                    "The reward margin of the last training step is 1.500 nats.\n\n## Settings"
                ),
            ],
        ),
        (SMOOTHED, ["The objective was dpo with beta 0.3 and label smoothing 0.1; losses are means"]),
    ],
    ids=["tokens", "pairs", "pairs that may be swapped"],
)
def test_the_card_states_the_objective_and_its_result(
    finished: Files, training: dict[str, str], sentences: list[str]
) -> None:
    job = context(finished)
    prepared = read_completion(job.workspace.completion("prepare"), PrepareRecord)
    record = read_completion(job.workspace.completion("train"), TrainRecord)
    assert prepared is not None
    assert record is not None
    content = job.spec.dump()
    spec = resolved_spec(QLoRAJobSpec.model_validate(content | {"training": content["training"] | training}))
    last = record.kept_step
    pairs = history_of(reward_margin=Curve((1, last), (0.1, 1.5)), eval_accuracy=Curve((0, last), (0.5, 0.9)))
    trained = TrainedJob("tiny", JOB_UID, spec, "tiny", prepared, record)
    card = adapter_model_card(trained, pairs if training else history_of())
    for sentence in sentences:
        assert sentence in card
    assert ("higher reward" in card) == bool(training)


def history_of(**curves: Curve) -> MetricsHistory:
    empty = {name: Curve() for name in MetricsHistory.__dataclass_fields__}
    return MetricsHistory(**{**empty, **curves})


@pytest.mark.parametrize("steps", [0, 1, 2, 5000])
def test_curves_of_any_length_can_be_drawn_and_the_same_run_gives_the_same_bytes(steps: int) -> None:
    loss = Curve(tuple(range(1, steps + 1)), tuple(1 / step for step in range(1, steps + 1)))
    history = history_of(loss=loss)
    assert unwrap(loss_chart)(history) == loss_chart(history)
    assert loss_picture(history, "name", "what") == loss_picture(history, "name", "what")
    svg = chart("rate", "Rate", loss, logarithmic=True)
    assert bool(svg) == bool(steps)
    assert len(svg) < 100_000


def test_a_broken_line_of_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        read_history(tmp_path / "metrics.jsonl")


def test_the_chart_of_the_memory_compares_the_measured_peaks_with_the_estimate() -> None:
    memory = MemoryStatus(estimate_bytes=3 * 10**9, high_bytes=4 * 10**9, budget_bytes=8 * 10**9, verdict="fits")
    curve = Curve((1, 2), (2.5e9, 2.6e9))
    shown = Page(chart("memory", "GPU memory", curve, unit="B", lines=estimated_peaks(memory))).words
    assert all(label in shown for label in ("estimate", "estimate, high", "usable"))
    assert "estimate" not in Page(chart("memory", "GPU memory", curve, unit="B")).words


def test_the_price_of_a_gpu_is_on_the_workspaces_page_and_not_the_published_one(trained: Files) -> None:
    job = trained.with_spec({"output": {"report": "full"}})
    priced = replace(context(job), gpu_hour_price="2.50 EUR")
    publish(priced, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert "EUR)" in page_of(job)
    shown = (job.workspace / "adapter" / "report.html").read_text()
    assert "hours: 1 attempt" in shown
    assert "EUR" not in shown
