"""A base sharded over two ranks must be 4-bit, and gives the results of a whole one."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, Qwen3MoeConfig

from qlora_api.contract import ExitCode
from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.adapter.attach import attach_adapter
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.base.load import check_quantization, load_base
from qlora_trainer.model.experts import compute
from qlora_trainer.model.experts.layout import NO_EXPERTS
from qlora_trainer.model.experts.loading import StoredExperts
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.training.distributed.sharding import STORAGE_DTYPE, shard_base
from tests.support.commands.command import Files
from tests.support.failures import failing
from tests.support.families import BY_HAND
from tests.support.manifests import merged
from tests.support.models.four_bit import convert
from tests.support.models.gathered import note_gathered
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.parts import bar_other_parts, packed_weights
from tests.support.models.sequences import CPU
from tests.support.models.tiny import SHAPE, save_model
from tests.support.ranks import EXACT, SHARDED, same_numbers
from tests.support.resolved import resolved_lora
from tests.support.runs.forks import Change, logs, train_ranks
from tests.support.training import prepared, run

NF4 = QuantizationSpec()
DEEP = SHAPE | {"num_hidden_layers": 6}
WITHOUT_EXPERTS = StoredExperts(Path(), NF4, NO_EXPERTS, {})


def holds_half(context: StepContext) -> None:
    """Each process has half of the bytes of the blocks, their constants, and of embeddings and output layer."""
    for log in logs(context):
        said = re.search(r"holds (\d+) of (\d+) bytes", log)
        assert said is not None
        assert int(said[1]) == pytest.approx(int(said[2]) / 2, rel=0.01)


def multiply_together() -> None:
    """Multiply all experts of a block together, as on a GPU that has the kernel."""
    vars(compute)["_multiplies_together"] = lambda *_: True


def test_a_sharded_base_gives_the_same_losses_from_half_of_its_bytes(
    tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]
) -> None:
    spread = prepared(tmp_path, tiny_llama, merged(EXACT, SHARDED), packed=False)

    train_ranks(spread)

    same_numbers(spread, together[1], 5e-4, of_norms=2e-3)
    holds_half(spread)


@pytest.mark.parametrize(
    ("family", "settings", "change"),
    [
        ("llama", {"lora": {"useDora": True}}, None),
        ("llama", {"lora": {"modulesToSave": ["embed_tokens", "lm_head"]}}, None),
        pytest.param("gemma2", {}, None, marks=pytest.mark.slow),
        ("phi3", {}, None),
        ("qwen3_moe", {}, None),
        ("qwen3_moe", {}, multiply_together),
        ("glm4_moe", {}, None),
        ("gpt_oss", {"training": {"gradientCheckpointing": False}}, None),
    ],
    ids=["dora", "whole-modules", "gemma2", "phi3", "experts", "experts-together", "shared-experts", "mxfp4-kept"],
)
def test_every_variant_and_family_trains_on_a_sharded_base_as_one_process_does(
    tmp_path: Path, family: str, settings: dict[str, Any], change: Change | None
) -> None:
    folder = tmp_path / "model"
    model = save_gpt_oss(folder) if family == "gpt_oss" else save_model(folder, BY_HAND[family][0])
    spec = merged({"lora": {"dropout": 0.0}, "training": {"maxSteps": 2}}, settings)
    alone = prepared(tmp_path / "alone", model, spec)
    run(alone)
    spread = prepared(tmp_path / "spread", model, merged(spec, SHARDED))

    train_ranks(spread, change)

    same_numbers(spread, alone, 5e-4, of_norms=2e-3)
    holds_half(spread)


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [
        (LlamaConfig(**DEEP), True),
        pytest.param(LlamaConfig(**DEEP), False, marks=pytest.mark.slow),
        (Qwen3MoeConfig(**DEEP, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16), True),
    ],
    ids=["recomputed", "kept", "experts"],
)
def test_two_blocks_at_most_are_gathered_at_a_time_and_none_after_a_pass(
    tmp_path: Path, config: PretrainedConfig, checkpointing: bool
) -> None:
    """The estimate counts two: a base of any size must train in its shares' memory."""
    model = save_model(tmp_path / "model", config)
    spec = merged(SHARDED, {"training": {"maxSteps": 2, "gradientCheckpointing": checkpointing}})
    notes = tmp_path / "gathered"

    train_ranks(prepared(tmp_path / "job", model, spec), partial(note_gathered, notes))

    for rank in (0, 1):
        lines = [json.loads(line) for line in Path(f"{notes}-{rank}").read_text().splitlines()]
        moments = {(line["moment"], line["grad"]) for line in lines}
        # The held-out rows are evaluated without gradients.
        assert moments >= {("forward", True), ("forward", False), ("backward", True), ("layer", True), ("layer", False)}
        at_work = [line for line in lines if line["moment"] == "layer"]
        assert {line["blocks"] for line in at_work} == {1}
        between = [line for line in lines if line["moment"] in ("forward", "backward")]
        assert {line["blocks"] for line in between} == {0}
        # Tables of values are in each stack, and small in a model that is not.
        assert max(line["held"] for line in between) < 0.6 * lines[0]["all"]
        assert max(line["bytes"] for line in lines) <= 2 * lines[0]["block"]


def test_a_rank_reads_its_part_of_each_packed_weight(tmp_path: Path) -> None:
    """Reading another part would end its process: the kernel rejects access to it."""
    model = save_model(tmp_path / "model", LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 1024}))
    context = prepared(tmp_path / "job", model, merged(SHARDED, {"training": {"maxSteps": 2}}))
    base = context.workspace.base

    train_ranks(context, partial(bar_other_parts, base, 2))

    whole = sum(end - begin for path in base.glob("*.safetensors") for begin, end in packed_weights(path))
    for rank in (0, 1):
        noted = json.loads(Path(f"{base}.rank-{rank}").read_text())
        # The other half, but for the pages that two parts share.
        assert noted["barred"] > 0.4 * whole
        # FSDP moves its input to a GPU before it takes a part of it.
        assert noted["given"] == 0


def test_weights_of_another_type_are_rejected_in_the_storage_that_sharding_needs(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """Afterwards they are pieces of memory without a type."""
    convert(tiny_llama, tmp_path / "base", QuantizationSpec(type="fp4"))
    base = load_base(tmp_path / "base", QuantizationSpec(type="fp4"), "cpu", STORAGE_DTYPE)
    with pytest.raises(StepFailure, match=r"'fp4'.*, not .*'nf4'") as asked_again:
        check_quantization(base, NF4)
    with pytest.raises(StepFailure, match=r"'fp4'.*, not .*'nf4'") as loaded:
        load_base(tmp_path / "base", NF4, "cpu", STORAGE_DTYPE)

    assert asked_again.value.exit_code is loaded.value.exit_code is ExitCode.BAD_CONFIGURATION


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group that spreading needs, of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def to_be_sharded(folder: Path) -> Any:
    """The model of a folder in main memory, with an adapter."""
    lora = resolved_lora(rank=4, alpha=8)
    return attach_adapter(
        load_base(folder, NF4, "cpu", STORAGE_DTYPE),
        lora,
        inspect_family(folder, lora).target_modules,
        seed=0,
        recomputation=RECOMPUTE_ALL,
        base_name="tiny",
        base_revision="0",
    )


@pytest.mark.usefixtures("group_of_one")
def test_the_constants_of_layers_outside_the_blocks_move_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT has two such layers. Note the moves that bitsandbytes gets, without a GPU."""
    config = OPTConfig(
        vocab_size=512, hidden_size=64, word_embed_proj_dim=32, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = to_be_sharded(save_model(tmp_path / "model", config))
    blocks = {id(module) for module in decoder_blocks(model.get_base_model()).modules()}
    outside = [m for m in model.modules() if isinstance(m, Linear4bit) and id(m) not in blocks]
    moved: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(QuantState, "to", lambda state, device: moved.append((id(state), device)))

    shard_base(model, CPU, 1, WITHOUT_EXPERTS)

    assert len(outside) == 2
    assert {(id(layer.quant_state), CPU) for layer in outside} <= set(moved)


def never_quantized(block: Any) -> None:
    block.mlp.up_proj.base_layer = Linear4bit(64, 128, bias=False, quant_storage=STORAGE_DTYPE)


def without_its_constants(block: Any) -> None:
    block.mlp.up_proj.base_layer.weight.quant_state = None


def no_longer_packed(block: Any) -> None:
    layer = block.mlp.up_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (never_quantized, r"block 0: mlp\.up_proj\.base_layer is not 4-bit"),
        (without_its_constants, r"block 0: mlp\.up_proj\.base_layer is not 4-bit"),
        (no_longer_packed, r"block 0: mlp\.up_proj\.base_layer is not 4-bit"),
    ],
)
def test_a_block_that_is_not_4_bit_is_not_sharded(tiny_llama: Path, broken: Any, named: str) -> None:
    model = to_be_sharded(tiny_llama)
    broken(model.get_base_model().model.layers[0])

    with failing(ExitCode.BAD_CONFIGURATION, match=named):
        shard_base(model, CPU, 1, WITHOUT_EXPERTS)

    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
