"""The benchmark of the training loop runs the real loop and changes nothing of what it computes."""

from pathlib import Path

from benchmarks.loop import alternating
from tests.support.training import adapter_bytes, history, prepared, run

SPEC = {"lora": {"dropout": 0.0}, "training": {"evalEverySteps": None}}


def test_a_run_that_is_measured_gives_the_same_adapter_and_a_pair_for_each_step_but_the_first(
    tmp_path: Path, tiny_llama: Path
) -> None:
    undisturbed, measured = (prepared(tmp_path / name, tiny_llama, SPEC) for name in ("undisturbed", "measured"))
    run(undisturbed)

    with alternating() as alternation:
        run(measured)

    assert [pair.first for pair in alternation.pairs] == ["loop", "bare", "loop", "bare", "loop"]
    assert adapter_bytes(measured) == adapter_bytes(undisturbed)
    assert history(measured) == history(undisturbed)
