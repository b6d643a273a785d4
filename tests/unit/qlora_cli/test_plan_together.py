"""The plan of several jobs: whether they can be trained together, and in how much memory."""

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.memory.estimate import ActivationBytes
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_cli.local.plan_together import JointPlan, make_joint_plan, require_joinable, show_joint_plan
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.model.memory.dry_run import StepSize
from tests.support.dry_runs import measure, measure_passes
from tests.support.model_configs import LLAMA_3_8B
from tests.support.tiny import merged

SPEC: dict[str, Any] = {
    "model": {"source": "hf://acme/model"},
    "dataset": {"source": "hf://acme/rows"},
    "lora": {"rank": 16},
    "training": {"maxSequenceLength": 1024},
    # Asked for in a group.
    "workspace": {"claimName": "experiments"},
}


def documents(**changes: dict[str, Any]) -> list[QLoRAJobDocument]:
    """A job of each name."""
    return [
        QLoRAJobDocument.model_validate(
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "metadata": {"name": name},
                "spec": merged(SPEC, changed),
            }
        )
        for name, changed in changes.items()
    ]


def planned(folder: Path, config: dict[str, Any], **changes: dict[str, Any]) -> JointPlan:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return make_joint_plan(documents(**changes), path, None, measure, measure_passes)


def shown(plan: JointPlan) -> str:
    output = io.StringIO()
    show_joint_plan(plan, Console(file=output, width=200))
    return output.getvalue()


def test_the_jobs_are_shown_beside_each_other_with_one_base_for_all(tmp_path: Path) -> None:
    plan = planned(tmp_path, LLAMA_3_8B, support={}, billing={"lora": {"rank": 64}})
    assert plan.memory is not None
    alone = [one.job.estimate(one.training) for one in plan.alone if one.job is not None]
    assert plan.memory.base_weights == alone[0].base_weights
    assert plan.memory.adapters == sum(memory.adapters for memory in alone)
    text = shown(plan)
    assert "2 jobs trained together: hf://acme/model" in text
    for name, memory in zip(("support", "billing", "All together"), (*alone, plan.memory), strict=True):
        assert any(name in line and f"{memory.expected / 2**30:.2f}" in line for line in text.splitlines())
    verdicts = [line.split() for line in text.splitlines() if line.strip().startswith("16 ")]
    assert verdicts == [["16", "fits", "fits", "fits"]]


def test_jobs_that_each_fit_may_not_fit_together(tmp_path: Path) -> None:
    many = {f"job{number}": {"resources": {"gpuMemory": 24 - number}} for number in range(16)}
    plan = planned(tmp_path, LLAMA_3_8B, **many)
    # Of the smallest GPU that a job names.
    assert plan.gpu_gib == 9
    assert plan.exit_code is ExitCode.DOES_NOT_FIT
    assert "exceeds: trained together, the run cannot fit on a GPU of 9 GiB" in shown(plan)
    assert "Train fewer of them together" in shown(plan)


def test_a_plan_of_a_part_of_a_group_says_so(tmp_path: Path) -> None:
    group = {"group": {"name": "rates", "size": 3}}
    plan = planned(tmp_path, LLAMA_3_8B, support=group, billing=group)
    assert "spec.group.size is 3, and this is the memory of 2 jobs: give the files of all." in shown(plan)
    assert "spec.group.size" not in shown(planned(tmp_path, LLAMA_3_8B, support=group, billing=group, legal=group))


def test_the_memory_is_unknown_without_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    plan = make_joint_plan(documents(support={}, billing={}), path, None)
    assert plan.exit_code is ExitCode.DONE
    assert "unknown: the trainer is not installed" in shown(plan)


def test_jobs_that_are_alike_are_measured_once_and_all_of_them_together(tmp_path: Path) -> None:
    ranks: list[int] = []
    joint: list[tuple[int, ...]] = []

    def counted(config: Path, spec: QLoRAJobSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        ranks.append(spec.lora.rank)
        step = MeasuredStep(
            sequences=1, sequence_tokens=1024, gradient_checkpointing=True, kept=2**20, loss=2**20, work=2**20
        )
        return MeasuredMemory(
            digest=digest,
            blocks=2,
            rank=spec.lora.rank,
            quantized_parameters=2**30,
            unquantized_bytes=2**20,
            adapter_parameters=spec.lora.rank * 2**20,
            pageable_parameters=0,
            whole_parameters=0,
            steps=(step,),
        )

    def counted_passes(
        config: Path, specs: Sequence[QLoRAJobSpec], passes: Sequence[tuple[int, ...]]
    ) -> tuple[ActivationBytes, ...]:
        joint.extend(passes)
        return tuple(
            ActivationBytes(checkpoints=len(numbers) * 2**20, kept=0, layers=2**20, logits=0) for numbers in passes
        )

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "starcoder2"}))
    unaccumulated = {"lora": {"rank": 64}, "training": {"gradientAccumulationSteps": 1}}
    jobs = documents(first={}, second={"training": {"learningRate": 1e-3}}, third=unaccumulated)
    plan = make_joint_plan(jobs, path, None, counted, counted_passes)
    assert ranks == [16, 64]
    # Of a step's later passes, and of the first, in which all take part.
    assert joint == [(0, 1), (0, 1, 2)]
    assert plan.memory is not None
    assert plan.memory.adapters == 4 * (16 + 16 + 64) * 2**20
    assert plan.memory.checkpoints == 2 * 2**20


def test_a_model_with_one_row_a_sequence_is_trained_alone(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="models of type bamba cannot keep the rows of several jobs apart"):
        planned(tmp_path, {"model_type": "bamba"}, support={}, billing={})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"lora": {"useDora": True}},
            "spec.lora.useDora is not supported when jobs are trained together: remove it",
        ),
        ({"model": {"source": "hf://acme/other"}}, "spec.model.source differs from that of first: give both the same"),
        ({"model": {"revision": "v2"}}, "spec.model.revision differs from that of first: give both the same model"),
        ({"quantization": {"type": "fp4"}}, "spec.quantization differs from that of first: give both the same model"),
        ({"group": {"name": "others", "size": 3}}, "spec.group differs from that of first: give both the same name"),
        ({"training": {"gradientCheckpointing": False}}, "spec.training.gradientCheckpointing differs from that of"),
    ],
)
def test_what_the_manifests_show_to_be_impossible_is_named(changes: dict[str, Any], reason: str) -> None:
    group = {"group": {"name": "rates", "size": 3}}
    with pytest.raises(StepFailure) as failure:
        require_joinable(documents(first=group, second={"model": {"revision": "main"}}, third=changes))
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert failure.value.message.startswith(f"third cannot be trained together with other jobs: {reason}")


def test_jobs_may_differ_in_all_else() -> None:
    other = {
        "dataset": {"source": "hf://acme/others", "eval": {"fraction": 0.1}},
        "lora": {"rank": 64, "targetModules": ["q_proj"]},
        "training": {"epochs": 3, "optimizer": "adamw", "keep": "best", "evalEverySteps": 5, "packing": False},
    }
    require_joinable(documents(first={}, second=other))
