"""Settings of a job that decide its memory: every one reaches the estimate."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.memory.advice import SHARDING_FIELDS, advice
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.together import ShareOfMemory, add_up
from qlora_api.memory.training_shape import Recomputation, TrainingShape
from qlora_api.schema import replace
from qlora_api.spec.gate import GateSpec, ScoreSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.fit import MemoryFit, training_shape
from qlora_trainer.model.memory.job_memory import MeasuredJob
from tests.support.dry_runs import estimate, estimate_together, measure, measure_passes
from tests.support.models.model_configs import LLAMA_3_8B
from tests.support.resolved import resolved_spec

SOURCES = {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}}


def job(**settings: Any) -> ResolvedSpec:
    return resolved_spec(QLoRAJobSpec.model_validate(SOURCES | settings))


def test_every_setting_that_decides_the_memory_reaches_the_estimate() -> None:
    spec = job(
        quantization={"doubleQuant": False},
        lora={
            "rank": 8,
            "dtype": "bfloat16",
            "dropout": 0.1,
            "useDora": True,
            "layersToTransform": [1, 3, 3],
            "modulesToSave": ["lm_head"],
        },
        training={
            "microBatchSize": 2,
            "maxSequenceLength": 256,
            "gradientAccumulationSteps": 4,
            "optimizer": "adamw",
            "gradientCheckpointing": False,
            "sharding": "full",
        },
        resources={"gpus": 2},
    )
    scored = replace(
        spec,
        gate=GateSpec(score=ScoreSpec(check="exactMatch", max_new_tokens=64)),
        training=replace(spec.training, batch_size=8),
    )
    shape = training_shape(scored, ["model.layers.0.self_attn.q_proj", "v_proj"], Recomputation(offloads=True))
    assert shape == TrainingShape(
        rank=8,
        adapter_bytes=2,
        target_modules=frozenset({"q_proj", "v_proj"}),
        adapted_layers=2,
        use_dora=True,
        whole_modules=frozenset({"lm_head"}),
        micro_batch_size=2,
        sequence_length=256,
        gradient_accumulation_steps=4,
        optimizer="adamw",
        double_quantization=False,
        recomputed_blocks=0,
        offloads_inputs=True,
        dropout=0.1,
        gpus=2,
        sharding="full",
        answer_tokens=(256, 320),
        has_batch_size=True,
        fixed=SHARDING_FIELDS,
    )
    default = TrainingShape()
    same = {field.name for field in fields(shape) if getattr(shape, field.name) == getattr(default, field.name)}
    assert not same


def fit(
    folder: Path,
    config: dict[str, Any],
    targets: tuple[str, ...] = ("all-linear",),
    gpu_gib: int = 24,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> MemoryFit:
    """The verdict on a job."""
    (folder / "config.json").write_text(json.dumps(config))
    spec = job(**{"resources": {"gpuMemory": f"{gpu_gib}Gi"}} | (settings or {}))
    return MemoryFit.from_config(
        folder / "config.json", spec, targets, **{"measure": measure, "measure_passes": measure_passes} | more
    )


def failing(*_arguments: object) -> Any:
    raise DryRunFailed("the dry run took more than 600 seconds")


def test_a_job_that_fits_is_advised_a_larger_micro_batch(tmp_path: Path) -> None:
    found = fit(tmp_path, LLAMA_3_8B)
    assert (found.status.verdict, found.status.source, found.objection) == ("fits", "DryRun", None)
    assert found.status.message.startswith(
        "spec.training.microBatchSize: 8 and spec.training.gradientAccumulationSteps: 2 fits too"
    )


def test_a_tight_job_is_advised_what_to_change_first(tmp_path: Path) -> None:
    found = fit(tmp_path, LLAMA_3_8B, gpu_gib=8, settings={"lora": {"rank": 64}})
    assert (found.status.verdict, found.objection) == ("tight", None)
    assert re.search(
        r"a GPU of 8 GiB \(.*\) has 7\.8 to use: set spec\.training\.optimizer: paged_adamw_8bit", found.status.message
    )


@pytest.mark.parametrize(("config", "parameters"), [(LLAMA_3_8B, 8_029_995_008), ({"model_type": "starcoder2"}, None)])
def test_when_the_dry_run_fails_the_memory_is_unknown_with_a_reason(
    config: dict[str, Any], parameters: int | None, tmp_path: Path
) -> None:
    found = fit(tmp_path, config, gpu_gib=4, measure=failing)
    assert found.status.dump() == {
        "verdict": "unknown",
        "message": "the memory is unknown: the dry run took more than 600 seconds",
    }
    assert (found.parameters, found.measured) == (parameters, None)
    found.require()


def test_a_target_module_that_the_family_does_not_have_is_rejected_by_field(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match=r"spec\.lora\.targetModules: .*embed_tokens") as failure:
        fit(tmp_path, LLAMA_3_8B, ("embed_tokens",), measure=failing)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


EARLIER = {"lora": {"rank": 1024, "from": {"source": "hf://org/adapter"}}}


def test_a_job_with_an_initial_adapter_is_not_advised_to_change_it(tmp_path: Path) -> None:
    """Another rank or shorter type would not fit the adapter: prepare rejects the job."""
    with_new, with_earlier = (
        fit(tmp_path, LLAMA_3_8B, gpu_gib=8, settings={"lora": {"rank": 1024}} if new else EARLIER).objection
        for new in (True, False)
    )
    assert with_new is not None
    assert with_earlier is not None
    assert "set spec.training.optimizer: paged_adamw_8bit" in with_earlier
    spec = job(**EARLIER)
    found = MeasuredJob.from_config(
        tmp_path / "config.json", spec, training_shape(spec, ["all-linear"]), measure=measure
    )
    changed = {change.setting for step in advice(found.estimate, found.training, 8) for change in step.changes}
    assert "training.optimizer" in changed
    assert not any(setting.startswith("lora.") for setting in changed)


def test_a_continued_job_is_not_advised_to_change_the_run(tmp_path: Path) -> None:
    settings = {"continues": "earlier", "training": {"microBatchSize": 4, "maxSequenceLength": 4096}}
    too_large = fit(tmp_path, LLAMA_3_8B, gpu_gib=6, settings=settings)
    assert too_large.objection is not None
    assert too_large.objection.endswith("use a larger GPU: a job with spec.continues cannot change these settings")
    with_room = fit(tmp_path, LLAMA_3_8B, gpu_gib=80, settings={"continues": "earlier"})
    assert "microBatchSize" not in with_room.status.message


def test_the_shared_memory_of_a_group_is_measured_too(tmp_path: Path) -> None:
    found = fit(tmp_path, LLAMA_3_8B, group_size=4)
    share = ShareOfMemory.from_status(found.status)
    assert share is not None
    shape = ModelShape.from_config(LLAMA_3_8B)
    training = training_shape(job(), ["all-linear"])
    together, alone = estimate_together(shape, [training] * 4), estimate(shape, training)
    assert add_up([share] * 4).expected == pytest.approx(together.expected, abs=4)
    assert alone.base_weights + alone.unquantized_weights < share.shared < alone.expected
    alone_only: tuple[dict[str, Any], ...] = (
        {},
        {"group_size": 4, "rows_apart": False},
        {"group_size": 4, "gpu_gib": 4},
    )
    for unshared in alone_only:
        assert fit(tmp_path, LLAMA_3_8B, **unshared).status.shared_bytes is None


def test_a_failed_joint_dry_run_leaves_the_groups_memory_unknown_with_a_reason(tmp_path: Path) -> None:
    found = fit(tmp_path, LLAMA_3_8B, group_size=4, measure_passes=failing)
    assert (found.status.source, found.status.shared_bytes, found.objection) == ("DryRun", None, None)
    assert "the memory of the whole group is unknown: the dry run took more than 600 seconds" in found.status.message


def test_a_base_that_several_gpus_can_share_is_advised_where_it_fits(tmp_path: Path) -> None:
    one = fit(tmp_path, LLAMA_3_8B, gpu_gib=7).objection
    assert one is not None
    assert re.search(r"gpus: \d and spec\.training\.sharding: full \(\d\.\d GiB on each\), or use a", one)
