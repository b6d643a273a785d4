"""Shows what local runs have published, and the best cell of a sweep."""

from collections.abc import Mapping

from rich.console import Console

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
    if number is not None:
        cell = sweep.cells[number]
        console.print(f"\nBest: {cell.name} ({cell.overrides.text()})", markup=False, highlight=False)


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
