"""Mixtures of experts are trained by the real step, with their experts in 4-bit and adapters on attention."""

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

from qlora_api.contract import ExitCode
from qlora_api.model_and_output import MergedSpec, OutputSpec
from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter, restore_adapter
from qlora_trainer.model.attention import RowBoundaries, rows_attention
from qlora_trainer.model.base import check_quantization, load_base
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.dry_run.limited import StepSize
from qlora_trainer.model.dry_run.measure import measure
from qlora_trainer.model.expert_stack import expert_stacks
from qlora_trainer.model.four_bit import quantize
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.storage import storage_of
from qlora_trainer.model.support import inspect_family
from qlora_trainer.steps.prepare import prepare
from tests.support.experts import BASE as EXPERTS_SHAPE
from tests.support.experts import EXPERTS
from tests.support.four_bit import convert
from tests.support.sequences import CPU
from tests.support.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run
from tests.trainer.conftest import MakeContext

SPEC: dict[str, Any] = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}
NF4 = QuantizationSpec()
# One with experts in every block, one with a dense block, shared experts, and experts in groups.
ALWAYS = ("qwen3_moe", "glm4_moe")


@dataclass(frozen=True)
class Trained:
    """A family's model folder, and the step that trained it without interruption."""

    name: str
    model: Path
    context: StepContext
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        return self.context.workspace.trained


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in EXPERTS],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "model", EXPERTS[request.param])
    context = prepared(root / "workspace", model, SPEC)
    return Trained(request.param, model, context, run(context))


@pytest.fixture(scope="module")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3_moe") / "model", EXPERTS["qwen3_moe"])


def original_matrices(model: Path) -> dict[str, list[list[Tensor]]]:
    """For each stack each expert's matrices, as transformers puts them together from the files."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return {
        name: [list(expert.detach().chunk(2 if "gate_up" in name else 1)) for expert in parameter]
        for name, parameter in whole.named_parameters()
        if parameter.ndim == 3
    }


def test_every_expert_is_in_4_bit_in_the_base_that_prepare_makes(trained: Trained) -> None:
    base = load_base(trained.context.workspace.base, NF4, "cpu")
    stacks, originals = dict(expert_stacks(base)), original_matrices(trained.model)

    assert stacks.keys() == originals.keys()
    assert not any(parameter.ndim == 3 for parameter in base.parameters())
    for name, matrices_of in originals.items():
        expected = type(stacks[name])(stacks[name].shape, stacks[name].pieces, NF4, "cpu")
        for expert, matrices in enumerate(matrices_of):
            for piece, matrix in enumerate(matrices):
                expected.put(expert, piece, quantize(matrix, NF4))
        assert all(map(torch.equal, stacks[name].buffers(), expected.buffers()))
    storage = storage_of(base)
    counted = sum(stack.parameters_count for stack in stacks.values())
    assert storage.parameters == trained.record.quantized_parameters
    assert storage.parameters > counted
    assert {kind.name for kind in storage.layers} >= {"gate_up_proj", "down_proj", "q_proj"}
    # The tables, a kilobyte each, count in tiny layers.
    assert 4.127 < storage.bits_per_parameter < 5.1


def test_attention_gets_an_adapter_and_learns(trained: Trained) -> None:
    adapter = load_file(trained.adapter / ADAPTER_FILE)

    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    expected = {f"model.layers.{block}.self_attn.{kind}_proj" for block in range(2) for kind in "qkvo"}
    if trained.name == "qwen2_moe":
        shared = ("model.layers.0.mlp", "model.layers.1.mlp.shared_expert")
        expected |= {f"{mlp}.{kind}_proj" for mlp in shared for kind in ("gate", "up", "down")}
    assert layers == expected
    assert [name for name, tensor in adapter.items() if not bool(tensor.any())] == []
    assert trained.record.eval_loss is not None
    assert trained.record.initial_eval_loss is not None
    assert trained.record.eval_loss < trained.record.initial_eval_loss


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    context = prepared(tmp_path, trained.model, SPEC)
    interrupted_at(context, 3)
    run(context)

    assert adapter_bytes(context) == adapter_bytes(trained.context)
    assert history(context) == history(trained.context)


def adapted(trained: Trained, *, checkpointing: bool = True) -> Any:
    spec = LoraSpec(rank=4, alpha=8)
    model = attach_adapter(
        load_base(trained.context.workspace.base, NF4, "cpu"),
        spec,
        inspect_family(trained.model, spec).target_modules,
        seed=0,
        gradient_checkpointing=checkpointing,
        base_name="tiny",
        base_revision="0",
    )
    restore_adapter(model, load_file(trained.adapter / ADAPTER_FILE))
    return model


def loss_and_gradients(model: Any, rows: list[Tensor], counted: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the row of this number, in a sequence with the others."""
    labels = [row if number == counted else torch.full_like(row, IGNORED_LABEL) for number, row in enumerate(rows)]
    sequence = PackedSequence(torch.cat(rows), torch.cat(labels), tuple(map(len, rows)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = batch_loss(model.get_base_model(), Batch.of([sequence], CPU))
    return [loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values()))]


def in_32_bit(model: Any) -> Any:
    """The model with every operation in float32, in which no token changes its experts for a rounding."""
    for module in model.float().modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def test_recomputed_blocks_give_the_same_gradients(trained: Trained) -> None:
    rows = [torch.arange(10, 30), torch.arange(100, 120)]
    kept, recomputed = (
        loss_and_gradients(adapted(trained, checkpointing=on), rows, 1, torch.bfloat16) for on in (False, True)
    )

    assert all(map(torch.equal, kept, recomputed))


def test_another_row_in_the_sequence_changes_a_rows_loss_and_gradients_by_rounding_only(trained: Trained) -> None:
    model = in_32_bit(adapted(trained))
    row = torch.arange(100, 114)

    alone = loss_and_gradients(model, [row], 0, torch.float32)
    behind = loss_and_gradients(model, [torch.arange(10, 30), row], 1, torch.float32)

    assert relative_error(behind, alone) < 1e-4


def test_plain_peft_reads_the_adapter_over_a_base_with_the_same_experts(trained: Trained) -> None:
    tokens = torch.arange(20, 60).unsqueeze(0)
    base = load_base(trained.context.workspace.base, NF4, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32, experts_implementation="eager")
    weights = {name: stack.dense(0, stack.shape[0], torch.float32) for name, stack in expert_stacks(base)}
    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            # In float32 bitsandbytes multiplies with weights that it does not round to 16 bit.
            state = copy(layer.weight.quant_state)
            state.dtype = torch.float32
            weights[f"{name}.weight"] = dequantize_4bit(layer.weight.data, state)
    plain.load_state_dict(weights, strict=False)
    served = PeftModel.from_pretrained(plain, trained.adapter).eval()
    ours = in_32_bit(adapted(trained)).eval().get_base_model()
    ours.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (model(input_ids=tokens, use_cache=False).logits for model in (ours, served))

    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_base_with_experts_of_another_type_is_noticed(tiny_qwen3_moe: Path) -> None:
    model = load_base(tiny_qwen3_moe, QuantizationSpec(type="fp4"), "cpu")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    stack.quantization = NF4

    with pytest.raises(StepFailure, match=r"layers\.0\.mlp\.experts\.gate_up_proj") as caught:
        check_quantization(model, QuantizationSpec(type="fp4"))
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def changed(model: Path, folder: Path, change: Any) -> Path:
    """A copy of a model with other tensors."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_that_are_stored_as_stacks_become_the_same_base(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        return rest | {
            name: torch.stack([torch.cat(matrices) for matrices in whole])
            for name, whole in original_matrices(tiny_qwen3_moe).items()
        }

    apart = convert(tiny_qwen3_moe, tmp_path / "apart", NF4)
    as_stacks = changed(tiny_qwen3_moe, tmp_path / "model", stacked)
    convert(as_stacks, tmp_path / "stacks", NF4)

    assert apart
    first, second, direct = (
        dict(expert_stacks(load_base(folder, NF4, "cpu")))
        for folder in (tmp_path / "apart", tmp_path / "stacks", as_stacks)
    )
    for name, stack in first.items():
        assert all(map(torch.equal, stack.buffers(), second[name].buffers()))
        assert all(map(torch.equal, stack.buffers(), direct[name].buffers()))


def test_an_expert_that_is_missing_or_has_another_shape_is_named(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[name]
        return tensors

    def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {name: tensors[name][:, :32].contiguous()}

    missing = changed(tiny_qwen3_moe, tmp_path / "missing", without)
    short = changed(tiny_qwen3_moe, tmp_path / "short", transposed)
    for read in (lambda folder: load_base(folder, NF4, "cpu"), lambda folder: convert(folder, tmp_path / "base", NF4)):
        with pytest.raises(StepFailure, match=r"layers\.1\.mlp\.experts\.down_proj\.3\.0") as caught:
            read(missing)
        assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE
        with pytest.raises(StepFailure, match=r"experts\.3\.down_proj\.weight .*\[64, 32\], not \[64, 64\]") as caught:
            read(short)
        assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ("down_proj",)}, "'down_proj', which no layer has besides routed experts and routers"),
        ({"target_modules": ("gate",)}, "'gate', which no layer has besides routed experts and routers"),
        ({"target_modules": ("gate_up_proj",)}, "allowed are all-linear and k_proj, o_proj, q_proj, v_proj"),
        ({"initialization": "loftq"}, "spec.lora.initialization is loftq"),
    ],
)
def test_adapters_on_experts_and_what_is_not_supported_for_them_is_refused(
    tiny_qwen3_moe: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(StepFailure) as caught:
        inspect_family(tiny_qwen3_moe, LoraSpec(**lora))

    assert message in caught.value.message
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_sharding_and_merging_are_refused_for_experts_only(tiny_qwen3_moe: Path, tiny_llama: Path) -> None:
    sharded, merged = TrainingSpec(sharding="full"), OutputSpec(merged=MergedSpec())
    routed, dense = inspect_family(tiny_qwen3_moe, LoraSpec()), inspect_family(tiny_llama, LoraSpec())

    with pytest.raises(StepFailure, match=r"spec\.training\.sharding is full") as of_sharding:
        routed.require_whole_and_unmerged(sharded, OutputSpec())
    with pytest.raises(StepFailure, match=r"spec\.output\.merged") as of_merging:
        routed.require_whole_and_unmerged(TrainingSpec(), merged)
    dense.require_whole_and_unmerged(sharded, merged)

    assert of_sharding.value.exit_code is of_merging.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_what_peft_would_take_for_a_routed_expert_gets_no_adapter(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", EXPERTS["glm4_moe"])
    family = inspect_family(model, LoraSpec())

    assert "model.layers.0.mlp.down_proj" in family.taken_for_experts
    assert "model.layers.1.mlp.shared_experts.up_proj" in family.taken_for_experts
    with pytest.raises(StepFailure, match="'up_proj', an adapter of which PEFT would read as one of routed experts"):
        inspect_family(model, LoraSpec(target_modules=("q_proj", "up_proj")))


def test_the_weight_of_a_shared_expert_stays_in_16_bit_and_gets_no_adapter(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", EXPERTS["qwen2_moe"])
    base = load_base(model, NF4, "cpu")

    routing = base.model.layers[1].mlp
    assert type(routing.shared_expert_gate) is nn.Linear
    assert routing.shared_expert_gate.weight.dtype == routing.gate.weight.dtype == torch.bfloat16
    assert isinstance(routing.shared_expert.up_proj, Linear4bit)
    family = inspect_family(model, LoraSpec())
    assert not any(name.endswith("gate") for name in family.target_modules)
    assert "model.layers.1.mlp.shared_expert.gate_proj" in family.target_modules


def test_rows_that_attend_to_each_other_are_noticed_although_experts_round(
    tiny_qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not inspect_family(tiny_qwen3_moe, LoraSpec()).one_row

    def leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        one = RowBoundaries.of((query.shape[2],), CPU)
        mixed, _ = rows_attention(module, query, key, value, mask, **settings | {"rows": one})
        apart, weights = rows_attention(module, query, key, value, mask, **settings)
        return apart + 1e-3 * (mixed - apart), weights

    monkeypatch.setattr("qlora_trainer.model.attention.rows_attention", leaky)
    assert inspect_family(tiny_qwen3_moe, LoraSpec()).one_row


def test_the_dry_run_counts_experts_in_4_bit_and_what_is_dequantized(tmp_path: Path) -> None:
    wide = Qwen3MoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024, head_dim=16)
    model = save_model(tmp_path / "model", wide)
    spec = QLoRAJobSpec.model_validate({"model": {"source": "hf://a/b"}, "dataset": {"source": "hf://a/c"}})
    found = measure(model / "config.json", spec, [StepSize(1, 8, True)], "digest")
    stored = storage_of(load_base(model, spec.quantization, "cpu"))

    assert found.quantized_parameters == stored.parameters
    # Gate and up of all eight experts take 2 MiB in 16 bit, down another: not those of both blocks, nor in 32 bit.
    assert 2 * 2**20 < found.steps[0].work < 4 * 2**20


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (
            GptOssConfig(**EXPERTS_SHAPE, num_local_experts=4, head_dim=16, sliding_window=8),
            "eager",
        ),
        (
            DeepseekV3Config(
                **EXPERTS_SHAPE | {"num_key_value_heads": SHAPE["num_attention_heads"]},
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=64,
                first_k_dense_replace=1,
                q_lora_rank=32,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
            ),
            "sdpa",
        ),
    ],
    ids=["sinks", "latent attention"],
)
def test_experts_behind_attention_of_another_kind_get_one_row_a_sequence(
    make_context: MakeContext, tmp_path: Path, config: PretrainedConfig, attention: str
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * 3) for n in range(8)])
    context = make_context(SPEC, model=save_model(tmp_path / "model", config))
    record = prepare(context, Recorded())
    assert (record.attention, record.packed, record.mixture_of_experts) == (attention, False, True)
    assert record.memory.source == "DryRun"
    assert {name.split(".")[3] for name in record.target_modules} == {"self_attn"}

    trained = run(context)

    assert trained.bits_per_parameter is not None
    assert trained.bits_per_parameter < 5.6
    (first, *_, last) = [line["loss"] for line in history(context) if "loss" in line]
    assert last < first
