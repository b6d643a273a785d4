"""Counts the bytes of an answer by the configuration of a model."""

from transformers import PretrainedConfig

from qlora_api.memory.estimate import AnswerBytes


def answer_bytes(config: PretrainedConfig) -> AnswerBytes:
    """Bytes of an answer, by the text model's configuration, with every block counted as attention.

    Of multi-head latent attention transformers keeps the keys and values of each head. A size that differs between
    blocks counts as its largest.
    """
    # transformers reads no size from the configuration of all blocks if theirs differ.
    blocks = list(config.per_layer_config) if config.is_heterogeneous else [config]
    heads, sizes = zip(*map(_attention_sizes, blocks), strict=True)
    return AnswerBytes.from_sizes(config.num_hidden_layers, max(heads), keys_and_values=max(sizes))


def _attention_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """The heads of a block, and the elements of a token's keys and values."""

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        return max(value) if isinstance(value, list | tuple) and value else value if isinstance(value, int) else default

    heads = size("num_attention_heads", 1)
    width = size("head_dim", size("hidden_size", 0) // heads)
    groups, key, value = size("num_key_value_heads", heads), width, width
    if size("kv_lora_rank", 0):
        groups, value = heads, size("v_head_dim", width)
        key = size("qk_nope_head_dim", width) + size("qk_rope_head_dim", 0)
    return heads, groups * (key + value)
