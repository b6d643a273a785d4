"""Shows what local runs have published, and the best cell of a sweep."""

from collections.abc import Mapping

from rich.console import Console

from qlora_api.contract import SWEEP_REPORT
from qlora_cli.local.run import Ended, LocalRun
from qlora_cli.local.run_sweep import LocalSweep, best_cell
from qlora_trainer.core.outcome import steps_done


def show_ends(sweep: LocalSweep, ended: Mapping[str, Ended], console: Console) -> None:
    """Print what each cell has published, and which is the best."""
    number = best_cell(sweep, ended)
    best = [sweep.best_run(number)] if number is not None and sweep.document.spec.publish == "best" else []
    for run in (*sweep.runs, *best):
        name = run.document.metadata.name
        if name in ended and "publish" in ended[name].results:
            console.print(f"\n{name}", style="bold", markup=False, highlight=False)
            show_end(ended[name], run, console)
    _show_comparison(sweep, ended, console)
    if number is not None:
        cell = sweep.cells[number]
        console.print(f"\nBest: {cell.name} ({cell.overrides.text()})", markup=False, highlight=False)


def _show_comparison(sweep: LocalSweep, ended: Mapping[str, Ended], console: Console) -> None:
    """Print a line for each cell that was run, and the address of the page with their curves."""
    lines = [("Cell", "Settings", "Held-out loss", "Answers that passed", "End")]
    for cell in sweep.cells:
        if (end := ended.get(cell.name)) is not None:
            lines.append((cell.name, cell.overrides.text(), *_outcome(end)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)
    page = sweep.shared / SWEEP_REPORT
    if page.exists():
        console.print(f"\nCurves of all cells: {page}", markup=False, highlight=False, soft_wrap=True)


def _outcome(end: Ended) -> tuple[str, str, str]:
    """The held-out loss, the share of answers that passed, and how the cell has ended."""
    train, publish = end.results.get("train"), end.results.get("publish")
    gate = None if publish is None else publish.gate
    score = "–" if gate is None or gate.score is None else f"{gate.score:.1%}"
    done = "published" if end.exit_code == 0 else f"failed with exit code {end.exit_code}"
    return _number(None if train is None else train.eval_loss), score, done


def show_end(ended: Ended, local: LocalRun, console: Console) -> None:
    """Print the places and results of a published adapter; nothing if there is none."""
    if "publish" not in ended.results or ended.results["publish"].adapter is None:
        return
    adapter, merged = ended.results["publish"].adapter, ended.results["publish"].merged
    base, gate = ended.results["publish"].base, ended.results["publish"].gate
    trained = ended.results["train"]
    rows = {
        "Adapter": adapter.uri,
        "SHA-256": adapter.sha256,
        "Optimizer steps": steps_done(trained.training_step or 0, trained.total_steps, adapter.step),
        "Training loss": _number(trained.loss),
    }
    if trained.eval_loss is not None:
        rows["Held-out loss"] = f"{_number(trained.initial_eval_loss)} before, {_number(trained.eval_loss)} after"
    if gate is not None and gate.score is not None:
        others = f"{gate.base_score or 0:.1%} without the adapter, {gate.score_rows} held-out rows"
        rows["Answers that passed"] = f"{gate.score:.1%} ({others})"
    for guard in gate.guards or () if gate is not None else ():
        rows[f"Loss on guard {guard.name}"] = (
            f"{_number(guard.base_loss)} without the adapter, {_number(guard.loss)} with"
        )
    for benchmark in gate.benchmarks or () if gate is not None else ():
        scores = f"{_number(benchmark.base_score)} without the adapter, {_number(benchmark.score)} with"
        rows[f"Benchmark {benchmark.task} ({benchmark.metric})"] = f"{scores}, {benchmark.rows} rows"
    if base is not None and base.uri is not None:
        rows["Base in 4-bit"] = base.uri
    if merged is not None:
        rows["Merged model"] = merged.uri
    if merged is not None and merged.eval_loss is not None:
        losses = f"{_number(merged.eval_loss)} merged, {_number(merged.adapter_eval_loss)} with the adapter"
        rows[f"Loss on {merged.eval_tokens} tokens"] = losses
    rows["Report"] = str(local.layout.report / "report.html")
    # A table of rich would cut paths and the digest to the width of the terminal, or to 80 columns without one.
    width = max(map(len, rows))
    for label, value in rows.items():
        console.print(f"{label:{width}}  {value}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
