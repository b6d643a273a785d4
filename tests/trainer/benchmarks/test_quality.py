"""The studies of quality and of automatic settings train what the product trains."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.tuning.subjects import load_subject
from benchmarks.tuning.training import train
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_tensors
from tests.support.resolved import resolved_spec
from tests.support.training import prepared, run


def test_the_study_and_the_train_step_make_the_same_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(
        tmp_path / "work", tiny_llama, {"training": {"optimizer": "adamw", "gradientCheckpointing": False}}
    )
    run(context)
    job = resolved_spec(context.spec)

    subject = load_subject("nf4-dq", tiny_llama, tmp_path / "base", job.lora, job.training.seed)
    train(subject, PreparedDataset.open(context.workspace.data / "rows", "train"), job.training)

    found, expected = adapter_tensors(subject.model), load_file(context.workspace.trained / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
