"""Writes the report of a run: an HTML page, the loss picture, and a summary."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api.artifact_status import MergedStatus
from qlora_api.choice import Choice
from qlora_api.contract import WorkspaceLayout
from qlora_api.duration import format_duration as duration
from qlora_api.forecast import cost_text, hours_text
from qlora_api.schema import replace
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_api.steps import STEPS
from qlora_trainer.core.completion import AttemptUsage, RunUsage
from qlora_trainer.core.context import Device
from qlora_trainer.core.file_names import CURVE_FILE, HISTORY_FILE, REPORT_FILE, SAMPLES_FILE, SUMMARY_FILE
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.statistics import DataStatistics, SourceStatistics
from qlora_trainer.history.metrics_log import MetricsHistory, read_history
from qlora_trainer.history.samples import MAX_NEW_TOKENS, Samples, read_samples
from qlora_trainer.report.charts import chart, histogram, loss_chart, loss_picture
from qlora_trainer.report.learning import learned_little
from qlora_trainer.report.model_card import TRAINED_ON, gate_data_text, quantization_label
from qlora_trainer.report.serving import rejected_by_vllm, served_rank, serving_commands

_GIB = 2**30
_ENDS = {"succeeded": "trained to its end", "interrupted": "asked to stop", "failed": "failed", None: "killed"}
_ONLY_IN_THE_WORKSPACE = (
    "they show rows of the data, and are on the page in the workspace; spec.output.report: full publishes them too"
)


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


def write_report(
    job: TrainedJob, workspace: WorkspaceLayout, *, device: Device, merged: MergedStatus | None = None
) -> bytes:
    """Write `report.html`, `loss.png` and `summary.json` into `report/`, and return the picture.

    `device` is what training ran on; `merged` is the merged model, once there is one.
    Raises OSError if the metrics are missing or the report cannot be written, ValueError for broken metrics.
    """
    folder, spec = workspace.report, job.spec
    history = read_history(folder / HISTORY_FILE)
    subtitle = (
        f"{spec.model.source}, {job.prepared.dataset.used_rows} rows, rank {spec.lora.rank}, "
        f"learning rate {spec.training.learning_rate:g}"
    )
    picture = loss_picture(history, job.name, subtitle, job.trained.kept_step)
    write_atomically(folder / CURVE_FILE, picture)
    summary = _summary(job, device, history)
    summary |= {name: part.dump() for name, part in (("gate", job.gate), ("merged", merged)) if part is not None}
    text = json.dumps(summary, indent=2, sort_keys=True, allow_nan=False)
    write_atomically(folder / SUMMARY_FILE, text.encode() + b"\n")
    statistics = DataStatistics.read(workspace.root / job.prepared.data_path)
    samples = read_samples(folder / SAMPLES_FILE)
    page = _page(job, device, history, statistics, samples, merged)
    write_atomically(folder / REPORT_FILE, page.encode())
    return picture


def published_page(job: TrainedJob, workspace: WorkspaceLayout, *, device: Device, samples: bool) -> bytes:
    """The page for the folder of the adapter. Without `samples` it shows no row of the data, and never a price.

    An adapter may be public; a GPU's price is between a company and its provider. The same run gives the same
    bytes. Raises as `write_report`.
    """
    job, folder = dataclasses.replace(job, gpu_hour_price=""), workspace.report
    shown = read_samples(folder / SAMPLES_FILE) if samples else Samples(missing=_ONLY_IN_THE_WORKSPACE)
    statistics = DataStatistics.read(workspace.root / job.prepared.data_path)
    return _page(job, device, read_history(folder / HISTORY_FILE), statistics, shown, None).encode()


def _page(
    job: TrainedJob,
    device: Device,
    history: MetricsHistory,
    statistics: DataStatistics,
    samples: Samples,
    merged: MergedStatus | None,
) -> str:
    # Names, prompts and answers come from users and data: everything is escaped except this module's charts.
    environment = Environment(
        loader=PackageLoader("qlora_trainer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        name=job.name,
        spec=job.spec,
        base=job.base_name,
        prepared=job.prepared,
        trained=job.trained,
        quantization=quantization_label(job.spec.quantization),
        figures=_figures(job, history, merged),
        remarks=_remarks(job, history),
        gate=job.gate,
        judged_on="" if job.gate is None else gate_data_text(job.gate),
        loss=loss_chart(history, job.trained.kept_step),
        charts=_charts(history, device, job.prepared.memory),
        resources=job.trained.usage and resources_used(job.trained.usage, device, job.gpu_hour_price),
        settings=_settings(job),
        data={**_data(job.spec.dataset, job.prepared.dataset, statistics), **_turns(job)},
        mix=_mix(statistics),
        lengths=_lengths(statistics),
        samples=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        commands=serving_commands(job),
        served_rank=served_rank(job.spec.lora),
        rejected_by_vllm=rejected_by_vllm(job.spec.lora),
        merged=merged,
    )


def _figures(job: TrainedJob, history: MetricsHistory, merged: MergedStatus | None) -> list[Figure]:
    spec, prepared, trained, gate = job.spec, job.prepared, job.trained, job.gate
    before, after = trained.initial_eval_loss, trained.eval_loss
    early = f"of {trained.total_steps:,}, stopped early" if trained.stopped_early else ""
    figures = [Figure("Optimizer steps", f"{trained.training_step:,}", early)]
    if trained.kept_step != trained.training_step:
        figures.append(Figure("Adapter of step", f"{trained.kept_step:,}", "the one with the lowest held-out loss"))
    accuracy = history.held_out_accuracy(trained.kept_step)
    if accuracy is not None:
        before_training = f"{history.eval_accuracy.values[0]:.1%} before training"
        figures.append(Figure("Held-out accuracy", f"{accuracy:.1%}", before_training))
    if before is not None and after is not None:
        figures.append(Figure("Held-out loss", f"{after:.4f}", f"{before:.4f} before training"))
    if merged is not None and merged.eval_loss is not None and merged.adapter_eval_loss is not None:
        same_rows = f"the adapter has {merged.adapter_eval_loss:.4f} on the same {merged.eval_tokens:,} tokens"
        # The compared loss is always the cross-entropy, whatever the objective is.
        label = "Cross-entropy, merged" if history.compares_answers else "Held-out loss, merged"
        figures.append(Figure(label, f"{merged.eval_loss:.4f}", same_rows))
    if gate is not None and gate.score is not None:
        others = f"{gate.base_score or 0:.1%} without the adapter, on the same {gate.score_rows} held-out rows"
        others += "" if spec.gate is None or spec.gate.score is None else f"; check {spec.gate.score.check}"
        figures.append(Figure("Answers that passed", f"{gate.score:.1%}", others))
    figures.append(Figure("Training loss", f"{trained.loss:.4f}", "of the last step"))
    speed = history.tokens_per_second.median
    if speed is not None:
        figures.append(Figure("Tokens per second", f"{speed:,.0f}", "median, without padding"))
    if trained.bits_per_parameter is not None:
        stored = f"{trained.quantized_parameters or 0:,} stored in 4-bit, constants included"
        figures.append(Figure("Bits per weight", f"{trained.bits_per_parameter:.3f}", stored))
    if trained.compute_type != "bfloat16":
        figures.append(Figure("Computed in", trained.compute_type, "as the first attempt chose for its processor"))
    if trained.goodput is not None:
        starts = "in one attempt" if trained.attempts == 1 else f"in {trained.attempts} attempts"
        figures.append(Figure("Goodput", f"{trained.goodput:.1%}", f"of the time {starts} is in the adapter"))
    if trained.peak_memory_bytes is not None:
        estimate = prepared.memory.estimate_bytes
        estimated = "" if estimate is None else f"estimate for a GPU: {estimate / _GIB:.2f} GiB"
        figures.append(Figure("Peak memory", f"{trained.peak_memory_bytes / _GIB:.2f} GiB", estimated))
    return figures


def _remarks(job: TrainedJob, history: MetricsHistory) -> list[str]:
    """Remarks without rows of the data, as they may be published."""
    of_steps = [remark for remark in job.prepared.remarks if remark.startswith(STEPS)]
    learned = learned_little(job.trained, history)
    return of_steps if learned is None else [*of_steps, f"the adapter {learned}"]


def _charts(history: MetricsHistory, device: Device, estimate: MemoryStatus) -> list[str]:
    memory = "GPU memory, peak per step" if device == "cuda" else "Resident memory"
    drawn = (
        chart("accuracy", "Held-out accuracy", history.eval_accuracy),
        chart("margin", "Reward margin (nats)", history.reward_margin),
        chart("chosen", "Reward of the chosen answer (nats)", history.chosen_reward),
        chart("rate", "Learning rate", history.learning_rate),
        chart("norm", "Gradient norm", history.grad_norm, logarithmic=True),
        chart("memory", memory, history.memory, unit="B", lines=estimated_peaks(estimate) if device == "cuda" else ()),
        chart("speed", "Tokens per second", history.tokens_per_second),
    )
    return [svg for svg in drawn if svg]


def _settings(job: TrainedJob) -> Mapping[str, Mapping[str, object]]:
    initial = job.prepared.initial_adapter
    return {
        "Quantization": job.spec.quantization.dump(),
        "Adapter": _marked(replace(job.spec.lora, initial_adapter=None).dump(), "lora", job.prepared.settings),
        "Training": _marked(_flat(job.spec.training.dump()), "training", job.prepared.settings),
        **({} if initial is None else {"Initialized with the adapter": initial.dump()}),
        **({} if job.continued is None else {"Continues the run of": job.continued}),
    }


def _marked(settings: Mapping[str, object], part: str, chosen: Iterable[Choice]) -> dict[str, object]:
    """Mark the settings of a part that the job left open, with the reasons of their values."""
    reasons = {each.setting: f"automatic: {each.reason}" if each.reason else "automatic" for each in chosen}
    return {
        name: f"{value} ({reasons[path]})" if (path := f"{part}.{name}") in reasons else value
        for name, value in settings.items()
    }


def _flat(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings, those of a part such as earlyStopping by its name and theirs."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
        flat |= inner
    return flat


def _data(spec: DatasetSpec, found: DatasetStatus, statistics: DataStatistics) -> Mapping[str, str]:
    train, overlap = statistics.train, statistics.overlap
    of_epoch = "Tokens per epoch" if statistics.epochs is None else "Tokens of the first epoch"
    lengths = statistics.sources[0].lengths
    per_row = f"{lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, mean {lengths.mean:,}"
    return {
        "Source": ", ".join(source.source for source in spec.training_sources.values()),
        "SHA-256": found.sha256,
        "Format": found.format,
        "Rows": f"{found.rows:,} read, {found.used_rows:,} trained on, {found.eval_rows:,} held out",
        "Left out": "; ".join(_unused_rows(statistics, len(spec.training_sources))) or "none",
        "Duplicates": f"{found.duplicate_rows:,} rows, {'left out' if spec.deduplicate else 'kept'}"
        if found.duplicate_rows
        else "none",
        **({} if overlap is None else {"Overlap": overlap.remark()}),
        **({"Tokens per row": per_row} if statistics.epochs is None else {"Epochs drawn": f"{statistics.epochs:,}"}),
        of_epoch: f"{train.tokens:,}, of which {train.target_tokens:,} count in the loss",
        "Sequences": f"{train.sequences:,} of at most {train.sequence_length:,} tokens, "
        f"{train.packing_efficiency:.1%} without padding{'' if train.packed else ' (one row each)'}",
    }


def _unused_rows(statistics: DataStatistics, training_sources: int) -> Iterator[str]:
    """Counts of unused rows with reasons, by source if there are several."""
    for number, source in enumerate(statistics.sources):
        held_out = " (held out)" if number >= training_sources else ""
        of = f" of {source.uri}{held_out}" if len(statistics.sources) > 1 else ""
        for rows in source.dropped:
            yield f"{rows.rows:,} {rows.reason}{of}"


def _mix(statistics: DataStatistics) -> list[SourceStatistics]:
    return [source for source in statistics.sources if source.epoch_rows is not None]


def _turns(job: TrainedJob) -> Mapping[str, str]:
    dataset, prepared = job.spec.dataset, job.prepared
    rows = {"Trained on": TRAINED_ON[job.spec.training.train_on]}
    if dataset.chat_template is not None:
        rows["Chat template"] = f"{dataset.chat_template}, SHA-256 {prepared.template_sha256}"
    if dataset.system_prompt is not None:
        whose = "in place of the rows' own" if dataset.system_prompt.mode == "replace" else "for rows without one"
        rows["System message"] = f"{dataset.system_prompt.text} ({whose})"
    if prepared.end_of_turn is not None:
        rows["End of an answer"] = prepared.end_of_turn.text or "none, so the model does not learn where to stop"
    return rows


def _lengths(statistics: DataStatistics) -> str:
    rows: Counter[int] = Counter()
    for source in _mix(statistics) or statistics.sources[:1]:
        rows.update({bar.up_to: bar.rows for bar in source.lengths.histogram})
    return histogram("lengths", "Tokens per row, at most", tuple((f"{up_to:,}", rows[up_to]) for up_to in sorted(rows)))


def _summary(job: TrainedJob, device: Device, history: MetricsHistory) -> JsonObject:
    """Return values for comparisons, in bytes and in nats per target token or pair."""
    spec, prepared, trained = job.spec, job.prepared, job.trained
    mix, source = spec.dataset.mix, spec.dataset.source
    preference: JsonObject = {}
    if history.compares_answers:
        preference["preference"] = {
            "rewardMargin": history.reward_margin.values[-1],
            "accuracy": history.accuracy.values[-1],
            "heldOutAccuracyBefore": history.held_out_accuracy(0),
            "heldOutAccuracyAfter": history.held_out_accuracy(trained.kept_step),
        }
    addresses: JsonObject = {"source": source} if mix is None else {"mix": [each.dump() for each in mix]}
    return {
        "job": {"name": job.name, "uid": job.uid},
        "model": {"source": spec.model.source, "revision": prepared.model_revision},
        "settings": {
            "quantization": spec.quantization.dump(),
            "lora": spec.lora.dump(),
            "training": spec.training.dump(),
        },
        "dataset": {**addresses, "packed": prepared.packed, **prepared.dataset.dump()},
        **({} if prepared.initial_adapter is None else {"initialAdapter": prepared.initial_adapter.dump()}),
        **({} if job.continued is None else {"continues": job.continued}),
        "optimizerSteps": trained.training_step,
        "plannedSteps": trained.total_steps,
        "adapterStep": trained.kept_step,
        "attempts": trained.attempts,
        "goodput": trained.goodput,
        **({} if trained.usage is None else {"usage": trained.usage.dump()}),
        "loss": {
            "training": trained.loss,
            "heldOutBefore": trained.initial_eval_loss,
            "heldOutAfter": trained.eval_loss,
        },
        **preference,
        "memory": {
            **prepared.memory.dump(),
            "peakBytes": trained.peak_memory_bytes,
            "measuredOn": device,
        },
    }


@dataclass(frozen=True)
class Resources:
    """The section of the report."""

    summary: str
    rows: Sequence[Sequence[str]]
    """A row for each attempt, in the order of the table's head, such as its start."""


def resources_used(usage: RunUsage, device: Device, price: str = "") -> Resources:
    """The section for that usage. `price`: of a GPU hour, such as `2.50 EUR`."""
    what = "GPU" if device == "cuda" else "processor"
    each = f"{usage.gpus} {what}{'' if usage.gpus == 1 else 's'}"
    used = usage.seconds * usage.gpus
    cost, lost = (_cost(seconds, price) for seconds in (used, usage.lost_seconds * usage.gpus))
    attempts = "1 attempt" if usage.count == 1 else f"{usage.count} attempts"
    summary = (
        f"{hours_text(used)} {what} hours{cost}: {attempts} on {each}, {duration(usage.seconds)} in all. Of that, "
        f"{duration(usage.startup_seconds)} went into loading, and {duration(usage.lost_seconds)} into work that an "
        f"interruption has undone{lost}."
    )
    return Resources(summary, [_row(attempt) for attempt in usage.attempts])


def _cost(seconds: float, price: str) -> str:
    """In parentheses, after a blank, or empty without a price."""
    amount, _, currency = price.partition(" ")
    return f" ({cost_text(seconds, amount, currency)})" if currency else ""


def _row(attempt: AttemptUsage) -> Sequence[str]:
    return (
        attempt.started_at,
        duration(attempt.seconds),
        "–" if attempt.startup_seconds is None else duration(attempt.startup_seconds),
        f"{attempt.from_step:,}",
        _ENDS[attempt.ended],
        duration(attempt.lost_seconds),
    )


def estimated_peaks(memory: MemoryStatus) -> tuple[tuple[str, float], ...]:
    """Labels and bytes of the estimate, expected and at most, without unknown ones."""
    values = {"estimate": memory.estimate_bytes, "estimate, high": memory.high_bytes, "usable": memory.budget_bytes}
    return tuple((label, float(value)) for label, value in values.items() if value is not None)
