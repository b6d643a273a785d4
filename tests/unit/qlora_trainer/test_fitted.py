"""Which activations are kept, and how large a micro batch is, by the memory of the GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_api.automatic import Limits, ModelFacts, assume
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.fit import MemoryFit, training_shape
from qlora_trainer.model.memory.fitted import FittedSettings, fit_settings
from tests.support.dry_runs import measure
from tests.support.manifests import MINIMAL, merged
from tests.support.models.model_configs import LLAMA_3_8B

OF_8B = ModelFacts(width=4096, weights_per_rank=2_621_440)
Fit = Callable[..., FittedSettings]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Chooses the settings of an 8B model for a GPU of so many GiB."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_8B))

    def fitted(gpu_gib: float | None, limits: Limits | None = None, **settings: Any) -> FittedSettings:
        spec = QLoRAJobSpec.model_validate(merged(MINIMAL["spec"], settings))
        return fit_settings(
            spec,
            lambda limits: assume(spec, OF_8B, None, limits),
            limits or Limits(),
            gpu_gib,
            lambda resolved, recomputation: training_shape(resolved, resolved.lora.target_modules, recomputation),
            lambda resolved, recomputation, earlier: MemoryFit.from_config(
                config,
                resolved,
                resolved.lora.target_modules,
                recomputation,
                gpu_gib=gpu_gib,
                earlier=earlier,
                measure=measure,
            ),
        )

    return fitted


def choices(fitted: FittedSettings) -> tuple[bool | int, int]:
    """Whether all blocks are recomputed, or how many, and the micro batch."""
    training, blocks = fitted.spec.training, fitted.recomputation.blocks
    return blocks or training.gradient_checkpointing, training.micro_batch_size


@pytest.mark.parametrize(
    ("gpu_gib", "tokens", "expected"),
    [
        (79.6, 2048, (False, 2)),
        (22.5, 2048, (False, 1)),
        (12.0, 2048, (21, 1)),
        (9.0, 2048, (30, 1)),
        (8.5, 2048, (31, 1)),
        (8.3, 2048, (True, 1)),
        (22.5, 512, (False, 4)),
        (22.5, 8192, (24, 1)),
        (79.6, 8192, (False, 1)),
        (None, 2048, (True, 2)),
    ],
)
def test_as_many_activations_are_kept_as_fit_even_in_smaller_micro_batches_of_2048_tokens(
    fit: Fit, gpu_gib: float | None, tokens: int, expected: tuple[bool, int]
) -> None:
    found = fit(gpu_gib, training={"maxSequenceLength": tokens})
    assert choices(found) == expected
    assert found.memory.status.verdict == ("unknown" if gpu_gib is None else "fits")


@pytest.mark.parametrize(("memory", "offloads", "verdict"), [("72Gi", True, "fits"), ("24Gi", False, "exceeds")])
def test_inputs_of_blocks_too_large_for_the_gpu_are_held_in_host_memory_that_has_room(
    fit: Fit, memory: str, offloads: bool, verdict: str
) -> None:
    found = fit(44.4, training={"maxSequenceLength": 131_072}, resources={"memory": memory})
    assert (choices(found), found.recomputation.offloads) == ((True, 1), offloads)
    assert found.memory.status.verdict == verdict
    if not offloads:
        assert "set spec.resources.memory: 62Gi, to hold the inputs of the blocks" in str(found.memory.objection)


def test_host_memory_holds_no_inputs_that_the_gpu_has_room_for(fit: Fit) -> None:
    assert not fit(44.4, training={"maxSequenceLength": 8192}, resources={"memory": "72Gi"}).recomputation.offloads


def test_the_forecast_counts_the_blocks_that_are_recomputed(fit: Fit) -> None:
    some = fit(22.5, training={"microBatchSize": 2, "maxSequenceLength": 2048})
    every, none = (fit(80, training={"gradientCheckpointing": wanted}) for wanted in (True, False))
    assert (every.recomputed_share, some.recomputed_share, none.recomputed_share) == (1, 12 / 32, 0)


def test_what_the_job_sets_is_kept(fit: Fit) -> None:
    assert choices(fit(80, training={"gradientCheckpointing": True})) == (True, 2)
    assert choices(fit(8, training={"gradientCheckpointing": False}))[0] is False
    # Its micro batch is not made smaller to keep activations.
    assert choices(fit(22.5, training={"microBatchSize": 2, "maxSequenceLength": 2048})) == (12, 2)


def test_all_is_recomputed_if_the_dry_run_fails(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> MeasuredMemory:
        raise DryRunFailed("out of time")

    monkeypatch.setattr("tests.unit.qlora_trainer.test_fitted.measure", failing)
    assert choices(fit(80)) == (True, 2)


def test_jobs_trained_together_and_sharded_ones_recompute(fit: Fit) -> None:
    assert choices(fit(80, Limits(group_size=2)))[0] is True
    assert choices(fit(80, training={"sharding": "full"}, resources={"gpus": 2}))[0] is True
