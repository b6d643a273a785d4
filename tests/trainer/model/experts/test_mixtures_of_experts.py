"""Experts become 4-bit from any storage; unsupported options are rejected."""

import re
from datetime import UTC, datetime
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    NemotronHConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from qlora_api.contract import ExitCode
from qlora_api.spec.output import MergedSpec, OutputSpec, PublishedBaseSpec
from qlora_api.spec.training import QuantizationSpec, ResourcesSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.model.adapter.attach import adapter_parameters, save_adapter
from qlora_trainer.model.base.load import check_quantization, load_base, storage_of
from qlora_trainer.model.experts.layout import routing_linears
from qlora_trainer.model.experts.stack import expert_stacks
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.families.rejection import reason_in_model
from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.measure import measure
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.families import CASES, EXPERTS, ROUTED
from tests.support.manifests import job_spec
from tests.support.models.adapted import adapted
from tests.support.models.four_bit import convert, expert_weights
from tests.support.models.mxfp4 import GPT_OSS
from tests.support.models.sequences import CPU
from tests.support.models.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.resolved import resolved_lora, resolved_spec, resolved_training
from tests.support.training import history, run
from tests.trainer.conftest import MakeContext

SPEC: dict[str, Any] = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}
NF4 = QuantizationSpec()


@pytest.fixture(scope="module")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3_moe") / "model", EXPERTS["qwen3_moe"][0])


def test_a_base_with_experts_of_another_type_is_rejected(tiny_qwen3_moe: Path) -> None:
    model = load_base(tiny_qwen3_moe, QuantizationSpec(type="fp4"), "cpu")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    stack.quantization = NF4

    with pytest.raises(StepFailure, match=r"layers\.0\.mlp\.experts\.gate_up_proj") as caught:
        check_quantization(model, QuantizationSpec(type="fp4"))
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def changed(model: Path, folder: Path, change: Any) -> Path:
    """A copy of a model with other tensors."""
    copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def require_unavailable(folder: Path, base: Path, message: str) -> None:
    """Neither loading the model nor converting it into a base takes these weights."""
    for read in (lambda: load_base(folder, NF4, "cpu"), lambda: convert(folder, base, NF4)):
        with pytest.raises(StepFailure, match=message) as caught:
            read()
        assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE


def stacked(model: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with its experts as transformers puts them together."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return rest | expert_weights(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))


def test_experts_that_are_stored_as_stacks_become_the_same_base(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    apart = convert(tiny_qwen3_moe, tmp_path / "apart", NF4)
    as_stacks = changed(tiny_qwen3_moe, tmp_path / "model", lambda tensors: stacked(tiny_qwen3_moe, tensors))
    convert(as_stacks, tmp_path / "stacks", NF4)

    assert apart
    first, second, direct = (
        dict(expert_stacks(load_base(folder, NF4, "cpu")))
        for folder in (tmp_path / "apart", tmp_path / "stacks", as_stacks)
    )
    assert first
    for name, stack in first.items():
        assert all(map(torch.equal, stack.buffers(), second[name].buffers()))
        assert all(map(torch.equal, stack.buffers(), direct[name].buffers()))


def test_transposed_stacks_are_rejected_unless_transformers_turns_them(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = stacked(tiny_qwen3_moe, tensors)
        return {name: tensor.mT.contiguous() if tensor.ndim == 3 else tensor for name, tensor in found.items()}

    folder = changed(tiny_qwen3_moe, tmp_path / "model", turned)
    require_unavailable(folder, tmp_path / "base", r"layers\.0\.mlp\.experts\.gate_up_proj in .* has shape")


def test_an_expert_that_is_missing_or_has_another_shape_is_named(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {other: tensor for other, tensor in tensors.items() if other != name}

    def short(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {name: tensors[name][:, :32].contiguous()}

    for change, message in (
        (without, r"layers\.1\.mlp\.experts\.down_proj\.3\.0"),
        (short, r"experts\.3\.down_proj\.weight .*\[64, 32\], not \[64, 64\]"),
    ):
        folder = changed(tiny_qwen3_moe, tmp_path / change.__name__, change)
        require_unavailable(folder, tmp_path / "base", message)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ("down_proj",)}, "'down_proj', which no layer has besides routed experts and routers"),
        ({"target_modules": ("gate",)}, "'gate', which no layer has besides routed experts and routers"),
        ({"target_modules": ("gate_up_proj",)}, "allowed are all-linear and k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_adapters_on_experts_with_unsupported_options_are_rejected(
    tiny_qwen3_moe: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(StepFailure) as caught:
        inspect_family(tiny_qwen3_moe, resolved_lora(**lora))

    assert message in caught.value.message
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_experts_that_a_token_is_not_routed_to_are_not_counted_for_it(tiny_qwen3_moe: Path) -> None:
    family = inspect_family(tiny_qwen3_moe, resolved_lora())
    config = AutoConfig.from_pretrained(tiny_qwen3_moe)
    of_an_expert = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    idle = (config.num_experts - config.num_experts_per_tok) * of_an_expert
    assert 0 < idle == family.idle_parameters
    assert family.parameters_of_token(10**9) == 10**9 - idle


def test_merging_and_publishing_the_base_are_rejected_for_experts_only(tiny_qwen3_moe: Path, tiny_llama: Path) -> None:
    routed, dense = inspect_family(tiny_qwen3_moe, resolved_lora()), inspect_family(tiny_llama, resolved_lora())
    base = OutputSpec(base=PublishedBaseSpec(destination="pvc://out/base"))
    training = resolved_training(sharding="full")
    routed.require(training, OutputSpec())
    for output, message in (
        (OutputSpec(merged=MergedSpec()), r"spec\.output\.merged"),
        (base, r"spec\.output\.base.* no server reads experts"),
    ):
        with pytest.raises(StepFailure, match=message) as caught:
            routed.require(training, output)
        assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
        dense.require(training, output)


SHARED = tuple(f"model.layers.1.mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down"))


def adapted_names(model: Any) -> set[str]:
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained}


@pytest.mark.parametrize("target", [list(SHARED), "|".join(map(re.escape, SHARED))], ids=["names", "pattern"])
def test_peft_takes_the_names_of_shared_experts_for_routed_ones(target: list[str] | str) -> None:
    model = AutoModelForCausalLM.from_config(EXPERTS["glm4_moe"][0])

    with_adapter = get_peft_model(model, LoraConfig(r=4, target_modules=target))

    assert {name.removesuffix(".base_layer") for name in adapted_names(with_adapter)} == {"model.layers.1.mlp.experts"}


@pytest.mark.parametrize("bits", [4, 16])
def test_plain_peft_puts_the_tensors_of_shared_experts_in_their_place(tmp_path: Path, bits: int) -> None:
    """Although the base has its routed experts in 16 bit."""
    folder = save_model(tmp_path / "model", EXPERTS["glm4_moe"][0])
    ours = adapted(folder, dropout=0.1)
    torch.manual_seed(1)
    for parameter in adapter_parameters(ours).values():
        torch.nn.init.normal_(parameter)
    (tmp_path / "adapter").mkdir()
    save_adapter(ours, tmp_path / "adapter")
    quantization = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else None
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)

    served = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)

    names = {f"base_model.model.{name}.lora_{matrix}.weight" for name in SHARED for matrix in "AB"}
    expected = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    found = get_peft_model_state_dict(served)
    assert names <= found.keys()
    assert found.keys() == expected.keys()
    # PEFT may keep them in the type of the base.
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in found.items())


def test_layers_that_peft_takes_for_experts_get_an_adapter_by_weight_but_no_dora(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", EXPERTS["glm4_moe"][0])

    family, dora = (inspect_family(model, resolved_lora(use_dora=way)) for way in (False, True))

    assert {"model.layers.0.mlp.down_proj", *SHARED} <= set(family.target_modules)
    assert set(family.target_modules) == {*dora.target_modules, *dora.without_dora}
    assert {name.split(".")[3] for name in dora.target_modules} == {"self_attn"}
    with pytest.raises(StepFailure, match=r"'up_proj', which can have no DoRA \(spec\.lora\.useDora\)"):
        inspect_family(model, resolved_lora(target_modules=("q_proj", "up_proj"), use_dora=True))


def test_the_weight_of_a_shared_expert_stays_in_16_bit_and_gets_no_adapter(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", EXPERTS["qwen2_moe"][0])
    base = load_base(model, NF4, "cpu")

    routing = base.model.layers[1].mlp
    assert type(routing.shared_expert_gate) is nn.Linear
    assert routing.shared_expert_gate.weight.dtype == routing.gate.weight.dtype == torch.bfloat16
    assert isinstance(routing.shared_expert.up_proj, Linear4bit)
    family = inspect_family(model, resolved_lora())
    assert not any(name.endswith("gate") for name in family.target_modules)
    assert "model.layers.1.mlp.shared_expert.gate_proj" in family.target_modules


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    config = Qwen3NextConfig(
        **ROUTED | {"hidden_size": 128},
        num_experts=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        head_dim=32,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    assert routing_linears(model) == tuple(f"model.layers.{block}.mlp.shared_expert_gate" for block in (0, 1))


def test_all_layers_of_a_router_stay_in_16_bit_and_get_no_adapter(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", CASES["zaya"].config())

    base, family = load_base(model, NF4, "cpu"), inspect_family(model, resolved_lora())

    routers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and ".gate." in name]
    assert {name.partition(".gate.")[2] for name in routers} == {
        "down_proj",
        "router_mlp.fc1",
        "router_mlp.fc2",
        "router_mlp.out_proj",
    }
    assert {type(base.get_submodule(name)) for name in routers} == {nn.Linear}
    gates = [module for name, module in base.named_modules() if name.endswith(".mlp.gate")]
    assert {type(gate).__name__ for gate in gates} == {"ExactZayaRouter"}
    assert not set(routers) & set(family.target_modules)


def test_a_family_with_a_count_of_experts_and_no_experts_is_no_mixture() -> None:
    """Transformers gives Nemotron-H eight, also where its pattern of blocks has none."""
    config = NemotronHConfig(**SHAPE | {"num_hidden_layers": 4}, hybrid_override_pattern="M-*-", n_routed_experts=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert reason_in_model(model) is None


def test_experts_whose_router_is_not_found_are_rejected() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CASES["qwen3_moe"].config())
    assert reason_in_model(model) is None
    for block in model.model.layers:
        block.mlp.gate = nn.Identity()
    assert "mlp.experts) whose router is not found" in str(reason_in_model(model))


def test_a_leak_between_rows_is_noticed_although_experts_round(
    tiny_qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not inspect_family(tiny_qwen3_moe, resolved_lora()).one_row

    def leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        one = RowBoundaries.from_lengths((query.shape[2],), CPU)
        mixed, _ = rows_attention(module, query, key, value, mask, **settings | {"rows": one})
        apart, weights = rows_attention(module, query, key, value, mask, **settings)
        return apart + 1e-3 * (mixed - apart), weights

    monkeypatch.setattr("qlora_trainer.model.kernels.attention.rows_attention", leaky)
    assert inspect_family(tiny_qwen3_moe, resolved_lora()).one_row


def test_the_dry_run_counts_4_bit_and_dequantized_experts(tmp_path: Path) -> None:
    wide = Qwen3MoeConfig(
        **SHAPE | {"num_hidden_layers": 3},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=1024,
        head_dim=16,
        mlp_only_layers=[0],
    )
    model = save_model(tmp_path / "model", wide)
    spec = resolved_spec(job_spec())
    found = measure(model / "config.json", spec, [StepSize(1, 8, True)], "digest")
    base = load_base(model, spec.quantization, "cpu")
    stored, layers = storage_of(base), base.get_decoder().layers[0].modules()
    dense = sum(layer.weight.quant_state.shape.numel() for layer in layers if isinstance(layer, Linear4bit))

    assert found.quantized_parameters == stored.parameters
    # When sharded, the two blocks with experts are gathered, which hold all but the first one's.
    assert found.two_blocks == pytest.approx(1 - dense / stored.parameters)
    # Gate and up of all eight experts take 2 MiB in 16 bit, down another: not those of both blocks, nor in 32 bit.
    assert 2 * 2**20 < found.steps[0].work < 4 * 2**20


@pytest.mark.parametrize(("gpu_memory", "has_all"), [(None, False), ("48Gi", False), ("80Gi", True)])
def test_the_dry_run_for_a_large_gpu_counts_all_experts_of_a_block(
    gpu_memory: str | None, has_all: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one that multiplies them all by one kernel."""
    wide = Qwen3MoeConfig(**SHAPE, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=1024, head_dim=16)
    model = save_model(tmp_path / "model", wide)
    # Gate and up of one expert, in 16 bit.
    of_one = 2 * 1024 * SHAPE["hidden_size"] * 2
    monkeypatch.setattr("qlora_trainer.model.experts.compute.DENSE_BYTES", of_one)
    spec = resolved_spec(job_spec(resources=ResourcesSpec(gpu_memory=gpu_memory)))

    work = measure(model / "config.json", spec, [StepSize(1, 8, True)], "digest").steps[0].work

    assert (work > 64 * of_one) is has_all


@pytest.mark.parametrize(
    ("config", "attention", "packed", "adapted_parts"),
    [
        (GPT_OSS, None, True, {"self_attn"}),
        (
            DeepseekV3Config(
                **ROUTED | {"num_key_value_heads": SHAPE["num_attention_heads"]},
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
            False,
            {"self_attn", "mlp"},
        ),
    ],
    ids=["sinks", "latent attention"],
)
def test_experts_behind_attention_with_sinks_are_packed_and_behind_latent_attention_not(
    make_context: MakeContext,
    tmp_path: Path,
    config: PretrainedConfig,
    attention: str | None,
    packed: bool,
    adapted_parts: set[str],
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * 3) for n in range(8)])
    context = make_context(SPEC, model=save_model(tmp_path / "model", config))
    record = prepare(context, Recorded())
    assert (record.attention, record.packed, record.mixture_of_experts) == (attention, packed, True)
    assert record.memory.source == "DryRun"
    assert {name.split(".")[3] for name in record.target_modules} == adapted_parts

    trained = run(context)

    assert trained.bits_per_parameter is not None
    assert trained.bits_per_parameter < 5.6
    (first, *_, last) = [line["loss"] for line in history(context) if "loss" in line]
    assert last < first

    publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    for text in (context.workspace.adapter / "README.md", context.workspace.report / "report.html"):
        assert "The base is a mixture of experts" in text.read_text(), text
