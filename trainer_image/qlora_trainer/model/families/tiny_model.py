"""Makes a small configuration of a family, with a block of each kind."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transformers import PretrainedConfig

from qlora_trainer.model.experts.layout import EXPERT_COUNTS

Settings: TypeAlias = Mapping[str, object]
VOCABULARY = 128
"""Tokens of a small model. The last ones are special: a test never draws them."""
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
WEIGHT_DEVIATION = 0.2
"""Standard deviation of the weights: scores differ, no token takes all attention."""
_WINDOW = 5
_CHUNK = 4
"""Tokens per state of a Mamba layer: fewer than in the probe's rows."""
_CHUNKS = ("mamba_chunk_size", "chunk_size")
_SOFTCAP = 1.0
"""Low enough to change every score and logit."""
_MOST_BLOCKS = 8
_WIDTH = 64
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "hidden_size_per_layer_input")
"""Sizes that no other depends on."""
_NUMBERS_OF_BLOCKS = ("attn_layer_indices", "cross_attention_layers")
"""Lists of the blocks that are of another kind, by number."""
_NO_VALUES_OF_BLOCKS = (*SPECIAL_TOKENS, "full_attn_idxs", *_NUMBERS_OF_BLOCKS)
"""Lists that may have as many entries as the model has blocks, by chance."""
_MOST_EXPERTS = 16
_DENSE_BLOCKS = ("first_k_dense_replace", "num_dense_layers")
"""Names for the number of first blocks without experts."""
_SEGMENTS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
"""Numbers of consecutive blocks, in families that repeat those in the middle."""


@dataclass(frozen=True)
class SmallConfig:
    """A small configuration, and what its blocks stand for."""

    config: PretrainedConfig
    stands_for: tuple[int, ...]
    """For each block of the whole model, the small model's block of its kind."""


def shrink(config: PretrainedConfig) -> SmallConfig:
    """The same family with few heads (of the same size, which positions depend on), few tokens and few blocks.

    The blocks show each kind that the model has: sliding or global, with or without rotation, with separate keys or
    those of an earlier block, with different sizes. Of a multimodal model the text decoder is small, and the rest as it
    is.
    """
    text = config.get_text_config(decoder=True)
    if text is config:
        return _shrink_decoder(config)
    small = _shrink_decoder(text)
    whole = copy.copy(config)
    for name, value in vars(config).items():
        if value is text:
            setattr(whole, name, small.config)
    return SmallConfig(whole, small.stands_for)


def _shrink_decoder(config: PretrainedConfig) -> SmallConfig:
    settings, overrides = _settings(config), _overrides(config)
    kinds = _kinds_of_blocks(config, settings, overrides)
    blocks = _blocks_of_each_kind(kinds)
    changes: dict[str, object] = {
        **{name: [values[block] for block in blocks] for name, values in _lists_by_block(config, settings).items()},
        **_small_sizes(settings, len(blocks)),
        **_parts_of_depth(config, settings, blocks),
        # The numbers of those that remain.
        **{
            name: [number for number, block in enumerate(blocks) if block in _entries(settings, name)]
            for name in _NUMBERS_OF_BLOCKS
            if _entries(settings, name)
        },
        **_experts(config, settings, blocks),
        "num_hidden_layers": len(blocks),
        "initializer_range": WEIGHT_DEVIATION,
        **{name: _SOFTCAP for name, value in settings.items() if "softcap" in name and value is not None},
        # The embedding rejects ids outside the small vocabulary.
        **{name: VOCABULARY - number for number, name in enumerate(SPECIAL_TOKENS, start=1)},
    }
    if settings.get("sliding_window"):
        changes["sliding_window"] = _WINDOW
    small = copy.deepcopy(config)
    if overrides:
        small.per_layer_config = {}
    for name, value in changes.items():
        if name in settings:
            setattr(small, name, value)
    if overrides:
        small.per_layer_config = _small_overrides(overrides, blocks)
    number_of = {kinds[block]: number for number, block in reversed(list(enumerate(blocks)))}
    return SmallConfig(small, tuple(number_of.get(kind, 0) for kind in kinds))


def _settings(config: PretrainedConfig) -> Settings:
    """The settings, under the names of this family and of transformers."""
    own: dict[str, object] = vars(config)
    return own | {name: own[of_family] for name, of_family in config.attribute_map.items() if of_family in own}


def _count(settings: Settings, name: str) -> int:
    """A setting that is a number, 0 without it."""
    value = settings.get(name)
    return value if isinstance(value, int) else 0


def _entries(settings: Settings, name: str) -> Sequence[object]:
    """The entries of a setting that is a list, none without it."""
    value = settings.get(name)
    return value if isinstance(value, list | tuple) else ()


def _overrides(config: PretrainedConfig) -> dict[int, dict[str, object]]:
    """Settings of single blocks that override the configuration, by block number."""
    found = config.to_dict().get("per_layer_config") or {}
    return {int(block): dict(values) for block, values in found.items()}


def _small_sizes(settings: Settings, blocks: int) -> dict[str, object]:
    heads = _count(settings, "num_attention_heads")
    head_size = _count(settings, "head_dim") or (_count(settings, "hidden_size") // heads if heads else _WIDTH)
    small_heads = 2 if _count(settings, "num_key_value_heads") in (0, heads) else 4
    hidden = small_heads * head_size
    sizes: dict[str, object] = {
        "num_attention_heads": small_heads,
        "num_key_value_heads": 2,
        "head_dim": head_size,
        "hidden_size": hidden,
        **_sizes_of_state(settings, hidden),
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
    }
    sizes |= {name: _CHUNK for name in _CHUNKS if _count(settings, name) > _CHUNK}
    for name in _WIDTHS:
        if value := settings.get(name):
            sizes[name] = [_WIDTH] * blocks if isinstance(value, list) else _WIDTH
    return sizes


def _sizes_of_state(settings: Settings, hidden: int) -> dict[str, int]:
    """Numbers of heads that fit a Mamba layer's inner width (arXiv 2405.21060)."""
    sizes: dict[str, int] = {}
    for expand, heads, head_size in (
        ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
        ("expand", "num_heads", "head_dim"),
    ):
        inner = _count(settings, expand) * hidden
        if inner and settings.get(heads):
            size = _count(settings, head_size) or inner // 2
            sizes |= {heads: inner // size, "n_groups": 1, "mamba_n_groups": 1}
    return sizes


def _parts_of_depth(config: PretrainedConfig, settings: Settings, blocks: list[int]) -> dict[str, int]:
    """Settings that count some of the blocks, for those that remain."""
    parts = {name: sum(_segment(settings, block) == name for block in blocks) for name in _SEGMENTS}
    if shared := _count(settings, "num_kv_shared_layers"):
        first = config.num_hidden_layers - shared
        parts["num_kv_shared_layers"] = sum(block >= first for block in blocks)
    return parts


def _experts(config: PretrainedConfig, settings: Settings, blocks: list[int]) -> dict[str, object]:
    """Fewer experts, in the remaining blocks that have some, after dense blocks."""
    dense = sum(not _is_sparse(config, settings, block) for block in blocks)
    changes: dict[str, object] = {
        **dict.fromkeys(_DENSE_BLOCKS, dense),
        "mlp_only_layers": list(range(dense)),
        "decoder_sparse_step": 1,
        "moe_layer_start_index": dense,
        "moe_layer_end_index": len(blocks) - 1,
        "moe_layer_interval": 1,
    }
    # Experts in groups have as many as their groups allow.
    if (_count(settings, "n_group") or 1) == 1:
        changes |= {name: min(_count(settings, name), _MOST_EXPERTS) for name in EXPERT_COUNTS}
    return {name: value for name, value in changes.items() if settings.get(name) is not None}


def _is_sparse(config: PretrainedConfig, settings: Settings, block: int) -> bool:
    """Whether a block has routed experts, by the numbers that families set."""
    last = settings.get("moe_layer_end_index", -1)
    last = last if isinstance(last, int) and last >= 0 else config.num_hidden_layers
    return (
        all(block >= _count(settings, name) for name in _DENSE_BLOCKS)
        and block not in _entries(settings, "mlp_only_layers")
        and (block + 1) % (_count(settings, "decoder_sparse_step") or 1) == 0
        and _count(settings, "moe_layer_start_index") <= block <= last
        and (block + 1) % (_count(settings, "moe_layer_interval") or 1) == 0
    )


def _segment(settings: Settings, block: int) -> str | None:
    end = 0
    for name in _SEGMENTS:
        end += _count(settings, name)
        if block < end:
            return name
    return None


def _small_overrides(overrides: Mapping[int, Settings], blocks: list[int]) -> dict[int | str, dict[str, object]]:
    small: dict[int | str, dict[str, object]] = {
        number: dict(overrides[block]) for number, block in enumerate(blocks) if block in overrides
    }
    for values in small.values():
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = 1
        values.update({name: _WIDTH for name in _WIDTHS if values.get(name)})
    return small


def _lists_by_block(config: PretrainedConfig, settings: Settings) -> dict[str, list[object]]:
    """The settings that have a value for each block, such as `layer_types`."""
    blocks = config.num_hidden_layers
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == blocks and name not in _NO_VALUES_OF_BLOCKS
    }


def _kinds_of_blocks(config: PretrainedConfig, settings: Settings, overrides: Mapping[int, Settings]) -> list[str]:
    """For each block all that distinguishes it."""
    blocks = config.num_hidden_layers
    first_shared = blocks - _count(settings, "num_kv_shared_layers")
    columns = list(_lists_by_block(config, settings).values())
    return [
        repr(
            (
                [column[block] for column in columns],
                overrides.get(block),
                block >= first_shared,
                not _is_sparse(config, settings, block),
                _segment(settings, block),
                [block in _entries(settings, name) for name in _NUMBERS_OF_BLOCKS],
            )
        )
        for block in range(blocks)
    ]


def _blocks_of_each_kind(kinds: list[str]) -> list[int]:
    """Return two to eight block numbers with each kind, the last of the last kind."""
    found = [block for block, kind in enumerate(kinds) if kind not in kinds[:block]][:_MOST_BLOCKS]
    if kinds[found[-1]] != kinds[-1]:
        found = [*found[: _MOST_BLOCKS - 1], len(kinds) - 1]
    return found if len(found) > 1 else found * 2
