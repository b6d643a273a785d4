"""The memory estimate: weights of real models, and the parts of a peak."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.gpus import GPUS
from qlora_api.memory.advice import budget, verdict
from qlora_api.memory.estimate import without_activations
from qlora_api.memory.model_shape import ModelShape, UnsupportedModelError
from qlora_api.memory.training_shape import ALL_LINEAR, TrainingShape
from qlora_api.memory.weights import count_weights
from tests.support.dry_runs import estimate
from tests.support.models.model_configs import LLAMA_2_7B, LLAMA_3_8B, dense

MISTRAL_7B = LLAMA_2_7B | {"intermediate_size": 14336, "model_type": "mistral", "num_key_value_heads": 8}
SMOLLM2_135M = dense("llama", 30, 576, 1536, (9, 3, 64), 49152, tied=True)
QWEN_3_4B = dense("qwen3", 36, 2560, 9728, (32, 8, 128), 151936, tied=True)


def llama(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocabulary: int) -> ModelShape:
    """An untied model with heads of 128."""
    return ModelShape.from_config(dense("llama", layers, hidden, mlp, (heads, kv_heads, 128), vocabulary))


LLAMA_65B = llama(80, 8192, 22016, 64, 64, 32000)
LLAMA_2_7B_SHAPE = ModelShape.from_config(LLAMA_2_7B)
LLAMA_3_8B_SHAPE = ModelShape.from_config(LLAMA_3_8B)
PHI_3 = replace(LLAMA_2_7B_SHAPE, model_type="phi3")
LLAMA_70B_SHAPE = llama(80, 8192, 28672, 64, 8, 32000)
PROJECTIONS = tuple(LLAMA_2_7B_SHAPE.projections)


@pytest.mark.parametrize(
    ("config", "parameters", "tolerance"),
    [
        (LLAMA_2_7B, 6_738_415_616, 1e-4),
        (MISTRAL_7B, 7_241_732_096, 1e-4),
        (SMOLLM2_135M, 134_515_008, 5e-4),
        (QWEN_3_4B, 4_022_468_096, 1e-4),
    ],
    ids=["Llama-2-7B", "Mistral-7B", "SmolLM2-135M", "Qwen3-4B"],
)
def test_a_config_gives_the_published_number_of_parameters(
    config: dict[str, Any], parameters: int, tolerance: float
) -> None:
    shape = ModelShape.from_config(config)
    assert shape.linear_parameters + shape.embedding_parameters == pytest.approx(parameters, rel=tolerance)


def test_a_nested_decoder_is_read() -> None:
    nested = {"model_type": "mistral3", "text_config": MISTRAL_7B, "vision_config": {"hidden_size": 1024}}
    assert ModelShape.from_config(nested) == ModelShape.from_config(MISTRAL_7B)


def test_a_nested_decoder_takes_the_outer_tie() -> None:
    inner = {key: value for key, value in SMOLLM2_135M.items() if key != "tie_word_embeddings"}
    nested = {"model_type": "idefics3", "tie_word_embeddings": True, "text_config": inner}
    assert ModelShape.from_config(nested).tie_word_embeddings


def test_missing_head_fields_follow_from_the_others() -> None:
    config = {key: value for key, value in LLAMA_2_7B.items() if key != "num_key_value_heads"} | {"head_dim": None}
    assert ModelShape.from_config(config) == LLAMA_2_7B_SHAPE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_local_experts": 8, "model_type": "mixtral"}, ("num_local_experts is 8", "mixture of experts")),
        ({"num_experts": 128, "model_type": "qwen3_moe"}, ("num_experts is 128", "mixture of experts")),
        ({"n_routed_experts": 64}, ("n_routed_experts is 64", "mixture of experts")),
        ({"model_type": "gpt2"}, ("model_type is 'gpt2'", "llama")),
        ({"model_type": "x" * 10_000}, ("model_type is 'xxx", "llama")),
        ({"model_type": None}, ("model_type is missing", "llama")),
        ({"hidden_size": None}, ("hidden_size is missing", "publisher")),
        ({"hidden_size": "4096"}, ("hidden_size is '4096'", "whole number")),
        ({"hidden_size": 4096.5}, ("hidden_size is '4096.5'", "whole number")),
        ({"intermediate_size": [11008, 8192]}, ("intermediate_size is '[11008, 8192]'", "whole number")),
        ({"num_hidden_layers": True}, ("num_hidden_layers is 'True'", "whole number")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers is 0", "from 1 to")),
        ({"vocab_size": -1}, ("vocab_size is -1", "from 1 to")),
        ({"vocab_size": 10**5000}, ("vocab_size is a number of 16610 bits", "from 1 to")),
        ({"num_attention_heads": 10**9}, ("num_attention_heads is 1000000000", "from 1 to")),
        ({"num_attention_heads": 31, "num_key_value_heads": None}, ("head_dim is missing", "multiple of")),
        ({"num_key_value_heads": 5}, ("num_key_value_heads is 5", "divide num_attention_heads")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings is 'yes'", "true or false")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_model_that_cannot_be_described_is_rejected_by_field(change: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelShape.from_config(LLAMA_2_7B | change)
    message = str(caught.value)
    assert all(part in message for part in named)
    assert len(message) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"adapter_bytes": 1}, "adapter_bytes is 1: must be one of 2, 4"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': must be one of paged_adamw_32bit"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_impossible_setting_is_rejected_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TrainingShape(), **change)


@pytest.mark.parametrize(("double_quantization", "bits"), [(True, 4.127), (False, 4.5)])
def test_base_weights_take_the_papers_bits_per_parameter(double_quantization: bool, bits: float) -> None:
    memory = estimate(LLAMA_65B, TrainingShape(double_quantization=double_quantization))
    assert memory.base_weights * 8 / LLAMA_65B.linear_parameters == pytest.approx(bits, abs=5e-4)


def test_the_rows_of_the_table_add_up() -> None:
    memory = estimate(LLAMA_2_7B_SHAPE, TrainingShape())
    rows = memory.components()
    names = ["context", "base_weights", "gathered_blocks", "unquantized_weights", "adapters", "gradients", "optimizer"]
    assert [row.name for row in rows] == [*names, "checkpoints", "layer_working_set", "logits", "answers"]
    assert all(row.label for row in rows)
    assert sum(row.size for row in rows if row.at_peak) == memory.expected


def test_parts_that_are_never_on_the_card_together_are_not_added_up() -> None:
    def absent(**settings: Any) -> list[str]:
        memory = estimate(LLAMA_3_8B_SHAPE, replace(TrainingShape(sequence_length=2048), **settings))
        return [row.name for row in memory.components() if not row.at_peak]

    assert absent(sequence_length=4096) == ["logits"]
    assert absent(sequence_length=512) == ["layer_working_set"]
    assert absent(sequence_length=4096, gradient_accumulation_steps=1) == ["gradients", "logits"]
    assert absent(sequence_length=512, gradient_accumulation_steps=1) == ["checkpoints", "layer_working_set"]
    assert absent(sequence_length=4096, recomputed_blocks=0) == ["logits"]
    assert absent(sequence_length=512, recomputed_blocks=0) == []


def test_scored_answers_count_where_they_take_more_than_a_step() -> None:
    small, long_answer = TrainingShape(rank=8, sequence_length=512), (512, 512 + 1024)
    without, scored = (
        estimate(LLAMA_2_7B_SHAPE, replace(small, answer_tokens=tokens)) for tokens in (None, long_answer)
    )
    # Keys and values of 4096 numbers each in 32 blocks, of 2 bytes; scores of 32 heads, of 8 bytes.
    assert scored.answers == 1536 * 32 * 2 * 4096 * 2 + 512**2 * 32 * 8
    assert {row.name for row in scored.components() if not row.at_peak} == {
        "gradients",
        "checkpoints",
        "layer_working_set",
        "logits",
    }
    assert scored.expected > without.expected
    # Of a model with few keys and values a step takes more.
    short = estimate(LLAMA_3_8B_SHAPE, replace(TrainingShape(), answer_tokens=(512, 640)))
    assert short.expected == estimate(LLAMA_3_8B_SHAPE, TrainingShape()).expected
    assert "answers" in {row.name for row in short.components() if not row.at_peak}


MODELS = st.builds(
    llama,
    layers=st.integers(2, 100),
    hidden=st.integers(1, 160).map(lambda blocks: 64 * blocks),
    mlp=st.integers(64, 40_000),
    heads=st.integers(1, 10).map(lambda groups: 8 * groups),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    vocabulary=st.integers(256, 300_000),
)
TRAININGS = st.builds(
    TrainingShape,
    rank=st.integers(1, 256),
    adapter_bytes=st.sampled_from([2, 4]),
    target_modules=st.just(ALL_LINEAR) | st.frozensets(st.sampled_from(PROJECTIONS), min_size=1),
    micro_batch_size=st.integers(1, 16),
    sequence_length=st.integers(1, 16_384),
    gradient_accumulation_steps=st.integers(1, 3),
    optimizer=st.sampled_from(["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]),
    double_quantization=st.booleans(),
    recomputed_blocks=st.none() | st.just(0),
    dropout=st.sampled_from([0.0, 0.1]),
)


@given(model=MODELS, training=TRAININGS, more=st.integers(1, 64))
def test_more_is_never_less_memory(model: ModelShape, training: TrainingShape, more: int) -> None:
    here = estimate(model, training).expected
    for field in ("rank", "micro_batch_size", "sequence_length", "gradient_accumulation_steps"):
        assert estimate(model, replace(training, **{field: getattr(training, field) + more})).expected >= here, field
    for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "vocab_size"):
        assert estimate(replace(model, **{field: getattr(model, field) + more}), training).expected >= here, field


@given(model=MODELS, training=TRAININGS)
def test_settings_that_save_memory_never_cost_any(model: ModelShape, training: TrainingShape) -> None:
    here, weights = estimate(model, training), without_activations(count_weights(model, training), training)
    assert here.low <= here.expected <= here.high
    assert weights.expected <= here.expected
    assert weights.low <= here.low
    for saving in ({"adapter_bytes": 2}, {"double_quantization": True}, {"optimizer": "paged_adamw_8bit"}):
        assert estimate(model, replace(training, **saving)).expected <= here.expected, saving


def test_only_large_tensors_of_a_paged_optimizer_may_leave_the_card() -> None:
    # 64 × 4096 and 64 × 11008 are above 100,000 elements, 8 × 4096 and 8 × 11008 below.
    large = estimate(LLAMA_2_7B_SHAPE, TrainingShape(rank=64))
    assert large.pageable_optimizer == large.optimizer == 32 * 64 * (8 * 4096 + 3 * (4096 + 11008)) * 8
    assert estimate(LLAMA_2_7B_SHAPE, TrainingShape(rank=8)).pageable_optimizer == 0
    assert estimate(LLAMA_2_7B_SHAPE, TrainingShape(optimizer="adamw")).pageable_optimizer == 0


def test_pages_are_credited_to_the_low_bound_only() -> None:
    paged = estimate(LLAMA_2_7B_SHAPE, TrainingShape())
    resident = estimate(LLAMA_2_7B_SHAPE, TrainingShape(optimizer="adamw"))
    assert (paged.expected, paged.high) == (resident.expected, resident.high)
    assert paged.low < resident.low


def test_weights_and_gradients_are_in_the_low_bound_whole() -> None:
    short, long = (estimate(LLAMA_2_7B_SHAPE, TrainingShape(optimizer="adamw", adapter_bytes=size)) for size in (2, 4))
    assert long.gradients == 2 * short.gradients
    assert long.low - short.low == pytest.approx(long.expected - short.expected, abs=1)


def test_a_65b_model_pages_on_an_l40s_and_is_not_rejected() -> None:
    memory, gib = estimate(LLAMA_65B, TrainingShape()), GPUS["l40s"].gib
    assert 0 < memory.expected - budget(gib) < memory.pageable_optimizer
    assert verdict(memory, gib) == "tight"


def test_adapters_on_fewer_layers_take_their_share() -> None:
    everything = estimate(LLAMA_3_8B_SHAPE, TrainingShape())
    named = estimate(LLAMA_3_8B_SHAPE, TrainingShape(target_modules=frozenset(PROJECTIONS)))
    queries = estimate(LLAMA_3_8B_SHAPE, TrainingShape(target_modules=frozenset({"q_proj"})))
    assert named == everything
    assert queries.adapters == 32 * 64 * (4096 + 4096) * 4


def test_sharding_divides_the_weights_and_gathers_two_blocks() -> None:
    whole = estimate(LLAMA_70B_SHAPE, TrainingShape(rank=16))
    shared = estimate(LLAMA_70B_SHAPE, TrainingShape(rank=16, gpus=2, sharding="full"))
    # Four bits and a constant of eight for each 64 weights.
    divided = LLAMA_70B_SHAPE.linear_parameters * (4 + 8 / 64) / 8
    assert whole.base_weights - shared.base_weights == pytest.approx(divided / 2, abs=2)
    assert shared.gathered_blocks == pytest.approx(2 * divided / 80, abs=1)


def test_sharding_divides_experts_and_gathers_those_of_two_blocks() -> None:
    training = TrainingShape(gpus=2, sharding="full")
    weights = replace(count_weights(LLAMA_3_8B_SHAPE, training), mxfp4_parameters=10**9, two_blocks=0.25)
    whole = without_activations(weights, replace(training, sharding="none"))
    shared = without_activations(weights, training)
    # A constant of eight bits for each 64 weights, and of MXFP4 for each 32.
    divided = (weights.quantized_parameters * (4 + 8 / 64) + 10**9 * (4 + 8 / 32)) / 8
    assert whole.base_weights - shared.base_weights == pytest.approx(divided / 2, abs=2)
    assert (whole.gathered_blocks, shared.gathered_blocks) == (0, pytest.approx(divided / 4, abs=1))


@pytest.mark.parametrize(("trained", "shares"), [((), 2), (("lm_head",), 1), (("embed_tokens", "lm_head"), 0)])
def test_sharding_divides_embeddings_and_output_layer_unless_they_are_trained(
    trained: tuple[str, ...], shares: int
) -> None:
    training = TrainingShape(rank=16, gpus=4, whole_modules=frozenset(trained))
    whole, shared = (estimate(LLAMA_70B_SHAPE, replace(training, sharding=way)) for way in ("none", "full"))
    each = 2 * LLAMA_70B_SHAPE.vocab_size * LLAMA_70B_SHAPE.hidden_size
    assert whole.unquantized_weights == 2 * each
    assert shared.unquantized_weights == (2 - shares) * each + shares * each // 4
    assert shared.adapters == whole.adapters


def test_a_sharded_70b_model_fits_two_24_gb_cards() -> None:
    training = TrainingShape(rank=16, gpus=2, sharding="full", optimizer="paged_adamw_8bit")
    assert verdict(estimate(LLAMA_70B_SHAPE, training), 24) != "exceeds"
    assert verdict(estimate(LLAMA_70B_SHAPE, replace(training, adapter_bytes=2)), 24) == "fits"
    assert verdict(estimate(LLAMA_70B_SHAPE, replace(training, sharding="none")), 24) == "exceeds"


def test_modules_trained_besides_the_adapter_are_counted() -> None:
    plain = estimate(LLAMA_3_8B_SHAPE, TrainingShape())
    whole = estimate(LLAMA_3_8B_SHAPE, TrainingShape(whole_modules=frozenset({"lm_head"})))
    head = LLAMA_3_8B_SHAPE.vocab_size * LLAMA_3_8B_SHAPE.hidden_size
    assert (whole.adapters - plain.adapters, whole.optimizer - plain.optimizer) == (2 * head, 8 * head)
    half = estimate(LLAMA_3_8B_SHAPE, TrainingShape(adapted_layers=16))
    assert 2 * half.adapters == plain.adapters
    dora = estimate(LLAMA_3_8B_SHAPE, TrainingShape(use_dora=True))
    outputs = sum(shape[1] for shape in LLAMA_3_8B_SHAPE.projections.values())
    assert dora.adapters - plain.adapters == 32 * outputs * 4


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (LLAMA_2_7B_SHAPE, frozenset({"q_proj", "c_attn"}), "target_modules is c_attn"),
        (LLAMA_2_7B_SHAPE, ALL_LINEAR | {"q_proj"}, "target_modules is all-linear"),
        (LLAMA_2_7B_SHAPE, frozenset(), "target_modules is empty"),
        (PHI_3, frozenset({"q_proj"}), r"target_modules is q_proj: must be for a phi3 .* qkv_proj"),
    ],
    ids=["unknown", "all and some", "none", "of another family"],
)
def test_impossible_targets_are_rejected_by_name(model: ModelShape, targets: frozenset[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(model, TrainingShape(target_modules=targets))
