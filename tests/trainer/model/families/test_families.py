"""Each family trains with the real step, resumes exactly, and matches plain PEFT."""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_api.memory.model_shape import SUPPORTED_MODEL_TYPES
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_parameters
from qlora_trainer.model.base.load import MIN_QUANTIZED_FRACTION, load_base, storage_of
from qlora_trainer.model.experts.stack import expert_stacks
from qlora_trainer.model.families.admission import check_model
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.memory.backward import backward
from qlora_trainer.model.memory.dry_run import StepSize, measure_within_limits
from qlora_trainer.model.memory.step import StepBytes, step_bytes
from qlora_trainer.model.source.files import CONFIG
from tests.support.families import CASES, REPRESENTATIVE, Case
from tests.support.manifests import job_spec
from tests.support.models.adapted import in_32_bit, loss_and_gradients, restored
from tests.support.models.four_bit import require_quantized_experts, settings
from tests.support.models.plain_loss import mean_loss
from tests.support.models.sequences import CPU, random_sequence
from tests.support.resolved import resolved_lora, resolved_spec, resolved_training
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run

SPEC: dict[str, Any] = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}
NF4 = QuantizationSpec()


@dataclass(frozen=True)
class Trained:
    """A family's model folder, and the step that trained it without interruption."""

    case: Case
    model: Path
    family: Family
    context: StepContext
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        return self.context.workspace.trained


def train_without_interruption(case: Case, root: Path) -> Trained:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms that begin at 1 and biases that begin at 0 would not be missed.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(root / "model")
    family = inspect_family(root / "model", resolved_lora())
    context = prepared(root / "workspace", root / "model", SPEC, packed=not family.one_row)
    return Trained(case, root / "model", family, context, run(context))


@pytest.fixture(scope="module")
def training_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Trained]:
    """Trains each family once."""
    return cache(lambda case: train_without_interruption(case, tmp_path_factory.mktemp(case.name)))


@pytest.fixture
def trained(request: pytest.FixtureRequest, training_of: Callable[[Case], Trained]) -> Trained:
    return training_of(request.param)


def of_each(
    chosen: Callable[[Case], bool] = lambda _case: True, guards: frozenset[str] = REPRESENTATIVE
) -> pytest.MarkDecorator:
    """Families other than the guards are tested only by `make test-all`."""
    return pytest.mark.parametrize(
        "trained",
        [
            pytest.param(case, id=name, marks=() if name in guards else pytest.mark.slow)
            for name, case in CASES.items()
            if chosen(case)
        ],
        indirect=True,
    )


# With rows packed and capped attention, with a state, packed and with one row a sequence, and with experts: no other
# rule of checkpoints and dry runs depends on the family.
OF_EACH_KIND = frozenset({"gemma2", "qwen3_5_text", "bamba", "qwen3_moe"})


def test_every_family_whose_memory_is_in_the_table_has_a_configuration_by_hand() -> None:
    by_hand = {case.config().get_text_config().model_type for case in CASES.values() if case.layers}
    assert by_hand >= set(SUPPORTED_MODEL_TYPES)


@of_each()
def test_every_adapted_layer_learns(trained: Trained) -> None:
    family, layers = trained.family, trained.case.layers
    adapter = load_file(trained.adapter / ADAPTER_FILE)

    assert (family.one_row, family.mixture_of_experts) == (trained.case.one_row, trained.case.experts)
    assert family.quantized_fraction >= MIN_QUANTIZED_FRACTION
    adapted_layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert adapted_layers == set(family.target_modules)
    assert [name for name, tensor in adapter.items() if not bool(tensor.any())] == []
    if layers:
        assert len(family.target_modules) == 2 * len(layers)
        assert {name.rpartition(".")[2] for name in family.target_modules} == layers
    assert trained.record.eval_loss is not None
    assert trained.record.initial_eval_loss is not None
    assert trained.record.eval_loss < trained.record.initial_eval_loss * (0.98 if layers else 1)


@of_each(guards=OF_EACH_KIND)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    context = prepared(tmp_path, trained.model, SPEC, packed=not trained.family.one_row)
    interrupted_at(context, 3)

    resumed = run(context)

    assert resumed.attempts == 2
    assert resumed.usage is not None
    assert [(attempt.from_step, attempt.ended) for attempt in resumed.usage.attempts] == [
        (0, "interrupted"),
        (3, "succeeded"),
    ]
    # Memory is that of the whole process, which only grows; the bill counts both attempts.
    of_the_process = ("peak_memory_bytes", "attempts", "usage")
    same = {name: getattr(trained.record, name) for name in of_the_process}
    assert resumed.model_copy(update=same) == trained.record
    assert adapter_bytes(context) == adapter_bytes(trained.context)
    assert history(context) == history(trained.context)


def adapted(trained: Trained, *, checkpointing: bool = True) -> Any:
    """The 4-bit base with the trained adapter, as the train step holds it."""
    return restored(trained.context.workspace.base, trained.adapter, trained.family, checkpointing=checkpointing)


ROW = torch.arange(100, 114)
OTHERS = tuple(torch.arange(start, start + 11) for start in (10, 300))


@of_each(lambda case: not case.one_row and not case.experts)
def test_another_row_in_the_sequence_changes_not_a_bit_of_a_rows_loss_and_gradients(trained: Trained) -> None:
    model = adapted(trained)

    behind_one, behind_another = (loss_and_gradients(model, other, ROW) for other in OTHERS)

    assert len(behind_one) == 1 + 2 * len(trained.family.target_modules)
    assert [tensor for tensor in behind_one if not bool(tensor.any())] == []
    assert all(map(torch.equal, behind_one, behind_another))


@of_each(lambda case: not case.one_row and case.experts)
def test_another_row_in_the_sequence_changes_experts_by_rounding_only(trained: Trained) -> None:
    model = in_32_bit(adapted(trained))

    alone = loss_and_gradients(model, ROW, dtype=torch.float32)
    behind = loss_and_gradients(model, OTHERS[0], ROW, dtype=torch.float32)

    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(behind, alone, strict=True)) < 1e-4


@of_each(lambda case: case.one_row)
def test_a_sequence_before_it_changes_not_a_bit_of_a_rows_loss_and_gradients(trained: Trained) -> None:
    model = adapted(trained)

    before = loss_and_gradients(model, ROW)
    loss_and_gradients(model, OTHERS[0])
    after = loss_and_gradients(model, ROW)

    assert [tensor for tensor in before if not bool(tensor.any())] == []
    assert all(map(torch.equal, before, after))


@of_each(lambda case: case.one_row)
def test_a_family_that_cannot_keep_rows_apart_takes_micro_batches_of_one_row(trained: Trained) -> None:
    with pytest.raises(
        StepFailure,
        match=r"set spec\.training\.microBatchSize to 1, and set batchSize or raise gradientAccumulationSteps",
    ):
        check_model(trained.model, job_spec(training=resolved_training(micro_batch_size=2, max_sequence_length=64)))

    training = resolved_training(max_sequence_length=64)
    family = check_model(trained.model, job_spec(training=training))
    assert not family.packs(training)
    assert any(remark.startswith("no packing") for remark in family.remarks(training))


@of_each(lambda case: not case.experts)
def test_plain_peft_over_plain_transformers_gives_the_loss_that_was_reported(trained: Trained) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        trained.model, quantization_config=settings(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            # bitsandbytes' own packing for some CPUs cannot hold layers as narrow as some of Gemma 3n's.
            layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, trained.adapter).eval()
    data = PreparedDataset.open(trained.context.workspace.data / "rows", "eval")

    assert math.isclose(mean_loss(model, data), trained.record.eval_loss or 0.0, rel_tol=2e-3)


@of_each(lambda case: case.experts)
def test_plain_peft_reads_the_adapter_over_a_base_with_the_same_experts(trained: Trained) -> None:
    tokens = torch.arange(20, 60).unsqueeze(0)
    base = load_base(trained.context.workspace.base, NF4, "cpu", attention=trained.family.attention)
    plain = AutoModelForCausalLM.from_pretrained(
        trained.model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    weights = {name: stack.dense(0, stack.shape[0], torch.float32) for name, stack in expert_stacks(base)}
    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            # In float32 bitsandbytes multiplies with weights that it does not round to 16 bit.
            state = copy(layer.weight.quant_state)
            state.dtype = torch.float32
            weights[f"{name}.weight"] = dequantize_4bit(layer.weight.data, state)
    assert plain.load_state_dict(weights, strict=False).unexpected_keys == []
    served = PeftModel.from_pretrained(plain, trained.adapter).eval()
    ours = in_32_bit(adapted(trained)).eval().get_base_model()
    ours.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (model(input_ids=tokens, use_cache=False).logits for model in (ours, served))

    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@of_each(lambda case: case.experts)
def test_every_expert_is_in_4_bit_in_the_base_that_prepare_makes(trained: Trained) -> None:
    base = load_base(trained.context.workspace.base, NF4, "cpu", attention=trained.family.attention)

    require_quantized_experts(base, AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.bfloat16))
    stacks, storage = dict(expert_stacks(base)), storage_of(base)
    assert storage.parameters == trained.record.quantized_parameters
    assert storage.parameters > sum(stack.parameters_count for stack in stacks.values())
    assert {kind.name for kind in storage.layers} > {name.rpartition(".")[2] for name in stacks}
    # The tables, a kilobyte each, count in tiny layers.
    assert 4.127 < storage.bits_per_parameter < 5.1


@of_each(lambda case: case.experts)
def test_recomputed_blocks_with_experts_give_the_same_gradients(trained: Trained) -> None:
    rows = (ROW,) if trained.family.one_row else (OTHERS[0], ROW)
    kept, recomputed = (loss_and_gradients(adapted(trained, checkpointing=way), *rows) for way in (False, True))

    assert all(map(torch.equal, kept, recomputed))


@of_each(guards=OF_EACH_KIND)
def test_the_dry_run_counts_the_memory_of_a_step(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure_within_limits(
        trained.model / CONFIG, resolved_spec(trained.context.spec), [StepSize(1, 64, True)], ""
    )
    if trained.case.name != "gemma3":  # Its part for images is quantized too, and not in the dry run.
        assert measured.quantized_parameters == trained.record.quantized_parameters
    adapter = load_file(trained.adapter / ADAPTER_FILE)
    assert measured.adapter_parameters == sum(tensor.numel() for tensor in adapter.values())

    # Its walk over the graph, in real training on a CPU.
    model, batch = adapted(trained), Batch.from_sequences([random_sequence((64,), 1)], CPU)
    counted: list[StepBytes] = []
    for run_backward in (Tensor.backward, backward):
        counted.append(step_bytes(model, batch, run_backward))
        # From here on as within a backward pass of the engine.
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        for parameter in adapter_parameters(model).values():
            parameter.grad = None
    engine, walk = counted
    # Nodes that are ready at the same time run in an arbitrary order, and some free more than others.
    assert (walk.kept, walk.loss, walk.work) == pytest.approx((engine.kept, engine.loss, engine.work), rel=0.05)
