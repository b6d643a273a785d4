"""What of a job decides its memory: every such setting reaches the estimate."""

from dataclasses import fields

import pytest

from qlora_api.contract import ExitCode
from qlora_api.memory.estimate import TrainingShape
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.memory_fit import training_shape

SOURCES = {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}}
# Fields that describe other trainers.
OF_OTHER_TRAINERS = {"loss_chunk_tokens", "upcast", "loss_bytes_per_logit"}


def test_every_setting_that_decides_the_memory_reaches_the_estimate() -> None:
    spec = QLoRAJobSpec.model_validate(
        SOURCES
        | {
            "quantization": {"doubleQuant": False},
            "lora": {
                "rank": 8,
                "dtype": "bfloat16",
                "dropout": 0.1,
                "useDora": True,
                "layersToTransform": [1, 3, 3],
                "modulesToSave": ["lm_head"],
            },
            "training": {
                "microBatchSize": 2,
                "maxSequenceLength": 256,
                "gradientAccumulationSteps": 4,
                "optimizer": "adamw",
                "gradientCheckpointing": False,
                "sharding": "full",
            },
            "resources": {"gpus": 2},
        }
    )
    shape = training_shape(spec, ["model.layers.0.self_attn.q_proj", "v_proj"])
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
        gradient_checkpointing=False,
        dropout=0.1,
        gpus=2,
        sharding="full",
    )
    default = TrainingShape()
    same = {field.name for field in fields(shape) if getattr(shape, field.name) == getattr(default, field.name)}
    assert same == OF_OTHER_TRAINERS


def test_a_target_module_that_no_family_has_is_rejected_by_field() -> None:
    with pytest.raises(StepFailure, match=r"spec\.lora\.targetModules: .*embed_tokens") as failure:
        training_shape(QLoRAJobSpec.model_validate(SOURCES), ["embed_tokens"])
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
