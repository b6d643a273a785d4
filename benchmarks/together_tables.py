"""Makes the tables of the documentation of what was measured of several adapters trained together."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.operator.table import head, row
from qlora_api.memory.estimate import estimate_together
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape
from qlora_trainer.core import cpu

MIB = 2**20
NAME, COMMAND = "together", "benchmarks.together"
"""Of the result, and what measures it."""
TARGET_SPEEDUP, TARGET_MEMORY = 1.5, 0.05
SMOLLM2_135M = ModelShape(
    model_type="llama",
    hidden_size=576,
    num_hidden_layers=30,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def tables(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    lines = head(
        "Tokens of each adapter in a step",
        "Adapters",
        "Together, tokens/s",
        "One by one, tokens/s",
        "",
        f"≥ {TARGET_SPEEDUP} ×",
    )
    for each in result["turns"]:
        tokens = each["adapters"] * each["tokens"]
        together, one_by_one = (tokens / median(each[way]) for way in ("together", "one_by_one"))
        factor = speedup(each)
        lines.append(
            row(
                str(each["tokens"]),
                str(each["adapters"]),
                f"{together:.0f}",
                f"{one_by_one:.0f}",
                f"{factor:.2f} ×",
                _met(factor >= TARGET_SPEEDUP),
            )
        )
    tokens = result["memory"][0]["tokens"]
    lines += [
        "",
        *head(
            f"Adapters, {tokens} tokens of each in a step",
            "Base, MiB",
            "Peak, MiB",
            "Base + adapters × one alone, MiB",
            f"≤ {100 * TARGET_MEMORY:.0f} % above",
            "Base + formula, MiB",
        ),
    ]
    alone = result["memory"][0]
    for each in result["memory"]:
        limit = each["base_bytes"] + each["adapters"] * (alone["peak_bytes"] - alone["base_bytes"])
        lines.append(
            row(
                str(each["adapters"]),
                *(f"{bytes_ / MIB:,.0f}" for bytes_ in (each["base_bytes"], each["peak_bytes"], limit)),
                _met(each["peak_bytes"] <= (1 + TARGET_MEMORY) * limit),
                f"{expected_peak(each, result['rank']) / MIB:,.0f}",
            )
        )
    return "\n".join(lines) + "\n"


def speedup(turns: Mapping[str, Any]) -> float:
    """How many times as many tokens per second are trained on together: median over the turns, each with both ways."""
    return median(alone / both for both, alone in zip(turns["together"], turns["one_by_one"], strict=True))


def expected_peak(measured: Mapping[str, int], rank: int) -> int:
    """Resident bytes by the formula of `qlora plan`: beside the base, which is there, all that training adds to it.

    Unlike on a GPU, logits of 128 tokens exist at a time, and there is no CUDA context.
    """
    run = TrainingShape(
        rank=rank,
        sequence_length=measured["tokens"],
        gradient_accumulation_steps=1,
        optimizer="adamw",
        loss_chunk_tokens=cpu.loss_chunk_tokens("cpu"),
    )
    memory = estimate_together(SMOLLM2_135M, [run] * measured["adapters"])
    return measured["base_bytes"] + memory.expected - memory.context - memory.base_weights - memory.unquantized_weights


def _met(met: bool) -> str:
    return "met" if met else "missed"
