"""The config.json of well-known models, without the fields that no test reads."""

from typing import Any

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
}


def dense(
    kind: str, layers: int, hidden: int, mlp: int, heads: tuple[int, int, int], vocabulary: int, *, tied: bool = False
) -> dict[str, Any]:
    """Return a dense model's config.json. `heads`: queries, keys, features of each."""
    queries, keys, features = heads
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": features,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


PUBLISHED_PARAMETERS: dict[str, int] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "google/gemma-3-4b-it": 4_300_079_472,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-3-12b-it": 12_187_325_040,
    "microsoft/phi-4": 14_659_507_200,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "openai/gpt-oss-20b": 20_914_757_184,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "google/gemma-3-27b-it": 27_432_406_640,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
}
"""The models of docs/how-to/choose-a-model.md, whose configs are packaged, as the Hub counts their weights."""
