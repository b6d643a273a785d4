"""The benchmarks run the real code without changing its results."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks import together
from benchmarks.loop import alternating
from tests.support.training import adapter_bytes, history, prepared, run

SPEC = {"lora": {"dropout": 0.0}, "training": {"evalEverySteps": None}}


def test_a_measured_run_gives_the_same_adapter_and_a_pair_per_step_after_the_first(
    tmp_path: Path, tiny_llama: Path
) -> None:
    undisturbed, measured = (prepared(tmp_path / name, tiny_llama, SPEC) for name in ("undisturbed", "measured"))
    run(undisturbed)

    with alternating() as alternation:
        run(measured)

    assert [pair.first for pair in alternation.pairs] == ["loop", "bare", "loop", "bare", "loop"]
    assert adapter_bytes(measured) == adapter_bytes(undisturbed)
    assert history(measured) == history(undisturbed)


def test_adapters_are_trained_together_and_one_by_one_by_the_same_steps(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "model_folder", lambda: tiny_llama)
    monkeypatch.setattr(together, "_TOKEN_IDS", 100)
    joint, single = (together._Adapters(2, 64) for _ in range(2))
    begun = {name: _flat(found) for name, found in joint.parameters.items()}
    joint.together()
    single.one_by_one()
    assert len(begun) == 2
    for name, before in begun.items():
        changes = [_flat(each.parameters[name]) - before for each in (joint, single)]
        # The first step of Adam is of one size for any gradient: only the direction counts.
        assert torch.cosine_similarity(*changes, dim=0) > 0.95
    turns = together.measure_turns(2, 64, steps=1)
    assert (len(turns.together), len(turns.one_by_one)) == (1, 1)


def _flat(parameters: Mapping[str, torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([each.detach().clone().flatten() for each in parameters.values()])
