"""Writes the report of a run: one self-contained HTML page, the picture of the loss, and a summary for programs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api.contract import WorkspaceLayout
from qlora_api.status import MergedStatus
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.file_names import CURVE_FILE, HISTORY_FILE, REPORT_FILE, SAMPLES_FILE, SUMMARY_FILE
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.statistics import DataStatistics
from qlora_trainer.report.charts import chart, histogram, loss_chart, loss_picture
from qlora_trainer.report.metrics_log import MetricsHistory, read_history
from qlora_trainer.report.samples import MAX_NEW_TOKENS, read_samples
from qlora_trainer.report.serving import refused_by_vllm, served_rank, serving_commands

_GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """A number on top of the page."""

    label: str
    value: str
    note: str = ""


def write_report(
    context: StepContext, prepared: PrepareRecord, trained: TrainRecord, merged: MergedStatus | None = None
) -> bytes:
    """Write `report.html`, `loss.png` and `summary.json` into `report/`; returns the picture.

    `merged` is the merged model, once there is one.
    Raises OSError if the metrics are missing or the report cannot be written, ValueError for broken metrics.
    """
    folder = WorkspaceLayout(context.workspace.root).report
    history = read_history(folder / HISTORY_FILE)
    subtitle = (
        f"{context.spec.model.source}, {prepared.dataset.used_rows} rows, rank {context.spec.lora.rank}, "
        f"learning rate {context.spec.training.learning_rate:g}"
    )
    picture = loss_picture(history, context.document.metadata.name, subtitle)
    write_atomically(folder / CURVE_FILE, picture)
    summary = _summary(context, prepared, trained) | ({} if merged is None else {"merged": merged.dump()})
    text = json.dumps(summary, indent=2, sort_keys=True, allow_nan=False)
    write_atomically(folder / SUMMARY_FILE, text.encode() + b"\n")
    write_atomically(folder / REPORT_FILE, _page(context, prepared, trained, history, merged).encode())
    return picture


def _page(
    context: StepContext,
    prepared: PrepareRecord,
    trained: TrainRecord,
    history: MetricsHistory,
    merged: MergedStatus | None,
) -> str:
    # Names, prompts and answers come from users and data: everything is escaped but the charts, which are drawn here.
    statistics = DataStatistics.read(context.workspace.root / prepared.data_path)
    environment = Environment(
        loader=PackageLoader("qlora_trainer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        name=context.document.metadata.name,
        spec=context.spec,
        base=context.base_name,
        prepared=prepared,
        trained=trained,
        figures=_figures(prepared, trained, history, merged),
        loss=loss_chart(history),
        charts=_charts(history, context.device),
        settings=_settings(context),
        data=_data(context, prepared, statistics),
        lengths=_lengths(statistics),
        samples=read_samples(context.workspace.report / SAMPLES_FILE),
        max_new_tokens=MAX_NEW_TOKENS,
        commands=serving_commands(context, prepared),
        served_rank=served_rank(context.spec.lora),
        refused_by_vllm=refused_by_vllm(context.spec.lora),
        merged=merged,
    )


def _figures(
    prepared: PrepareRecord, trained: TrainRecord, history: MetricsHistory, merged: MergedStatus | None
) -> list[Figure]:
    before, after = trained.initial_eval_loss, trained.eval_loss
    figures = [Figure("Optimizer steps", f"{trained.training_step:,}")]
    if before is not None and after is not None:
        figures.append(Figure("Held-out loss", f"{after:.4f}", f"{before:.4f} before training"))
    if merged is not None and merged.eval_loss is not None and merged.adapter_eval_loss is not None:
        same_rows = f"the adapter has {merged.adapter_eval_loss:.4f} on the same {merged.eval_tokens:,} tokens"
        figures.append(Figure("Held-out loss, merged", f"{merged.eval_loss:.4f}", same_rows))
    figures.append(Figure("Training loss", f"{trained.loss:.4f}", "of the last step"))
    speed = history.tokens_per_second.median
    if speed is not None:
        figures.append(Figure("Tokens a second", f"{speed:,.0f}", "median, without padding"))
    if trained.bits_per_parameter is not None:
        held = f"{trained.quantized_parameters or 0:,} held in 4 bit, constants included"
        figures.append(Figure("Bits a weight", f"{trained.bits_per_parameter:.3f}", held))
    if trained.peak_memory_bytes is not None:
        estimate = prepared.memory.estimate_bytes / _GIB
        figures.append(
            Figure("Peak memory", f"{trained.peak_memory_bytes / _GIB:.2f} GiB", f"estimated for a GPU: {estimate:.2f}")
        )
    return figures


def _charts(history: MetricsHistory, device: str) -> list[str]:
    memory = "GPU memory, peak of the step" if device == "cuda" else "Resident memory"
    drawn = (
        chart("rate", "Learning rate", history.learning_rate),
        chart("norm", "Gradient norm", history.grad_norm, logarithmic=True),
        chart("memory", memory, history.memory, unit="B"),
        chart("speed", "Tokens a second", history.tokens_per_second),
    )
    return [svg for svg in drawn if svg]


def _settings(context: StepContext) -> Mapping[str, Mapping[str, Any]]:
    spec = context.spec
    return {
        "Quantization": spec.quantization.dump(),
        "Adapter": spec.lora.dump(),
        "Training": spec.training.dump(),
    }


def _data(context: StepContext, prepared: PrepareRecord, statistics: DataStatistics) -> Mapping[str, str]:
    found, spec, train = prepared.dataset, context.spec, statistics.train
    dropped = [f"{rows.rows:,} {rows.reason}" for source in statistics.sources for rows in source.dropped]
    lengths = statistics.sources[0].lengths
    return {
        "Source": spec.dataset.source,
        "SHA-256": found.sha256,
        "Format": found.format,
        "Rows": f"{found.rows:,} read, {found.used_rows:,} trained on, {found.eval_rows:,} held out",
        "Left out": "; ".join(dropped) or "none",
        "Tokens in a row": f"{lengths.shortest:,} to {lengths.longest:,}, "
        f"median {lengths.median:,}, mean {lengths.mean:,}",
        "Tokens in an epoch": f"{train.tokens:,}, of which {train.target_tokens:,} count in the loss",
        "Sequences": f"{train.sequences:,} of at most {train.sequence_length:,} tokens, "
        f"{train.packing_efficiency:.1%} filled{'' if train.packed else ' (one row each)'}",
    }


def _lengths(statistics: DataStatistics) -> str:
    bars = statistics.sources[0].lengths.histogram
    return histogram("lengths", "Tokens in a row, up to", {f"{bar.up_to:,}": bar.rows for bar in bars})


def _summary(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> dict[str, Any]:
    """What a person or a program compares between runs. Sizes in bytes, losses in nats per target token."""
    return {
        "job": {"name": context.document.metadata.name, "uid": context.job_uid},
        "model": {"source": context.spec.model.source, "revision": prepared.model_revision},
        "settings": {
            "quantization": context.spec.quantization.dump(),
            "lora": context.spec.lora.dump(),
            "training": context.spec.training.dump(),
        },
        "dataset": {"source": context.spec.dataset.source, "packed": prepared.packed, **prepared.dataset.dump()},
        "optimizerSteps": trained.training_step,
        "loss": {
            "training": trained.loss,
            "heldOutBefore": trained.initial_eval_loss,
            "heldOutAfter": trained.eval_loss,
        },
        "memory": {
            **prepared.memory.dump(),
            "peakBytes": trained.peak_memory_bytes,
            "measuredOn": context.device,
        },
    }
