"""Writes the page of all model families that transformers has, and the types with one row; run by `make families`.

Each is probed as `prepare` does it, from the default configuration, with what every published model of it has besides.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from qlora_api.memory import one_row
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.sandbox import DryRunFailed, within_limits
from qlora_trainer.model.errors import UNUSABLE, with_error
from qlora_trainer.model.families.family import ALTERNATIVE, Family
from qlora_trainer.model.families.inspection import inspect_family

PAGE = Path(__file__).parent / "reference" / "families.md"
TABLE = Path(one_row.__file__)
"""For `qlora plan`, which has no torch to probe a family with."""
NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MULTIMODAL_NAMES = tuple(sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES).difference(NAMES)))
_SECONDS = 120
_LONGEST_REASON = 240
_ROTATION = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
# Settings of every published model of the family that transformers' default leaves out.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6},
    "glm46v": {"text_config": {"num_attention_heads": 32, "rope_parameters": _ROTATION}},
    "glm4v": {"text_config": {"num_attention_heads": 32, "rope_parameters": _ROTATION}},
    "glm4v_moe": {"text_config": {"head_dim": 128, "rope_parameters": _ROTATION}},
    "glmga": {"text_config": {"num_attention_heads": 32, "rope_parameters": _ROTATION}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024},
        }
    },
}


@dataclass(frozen=True)
class Entry:
    """A family, by its `model_type`."""

    name: str
    family: Family | None
    """What is known of a family that is trained."""
    reason: str = ""
    """Why it is not."""


def main() -> int:
    """Probe all families and write page and table; returns the exit code."""
    causal, multimodal = (tuple(map(entry, names)) for names in (NAMES, MULTIMODAL_NAMES))
    PAGE.write_text(page(causal, multimodal))
    TABLE.write_text(table(causal + multimodal))
    return 0


def entry(name: str) -> Entry:
    """Probe one family, in a process with limits."""
    try:
        return Entry(name, within_limits(_family, (name,), seconds=_SECONDS, what="the inspection"))
    except (StepFailure, DryRunFailed) as failure:
        return Entry(name, None, _reason(str(failure)))


def _family(name: str) -> Family:
    # A process that was forked has none of its parent's threads, which PyTorch would wait for.
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        try:
            AutoConfig.for_model(name, **SETTINGS.get(name, {})).save_pretrained(folder)
        except UNUSABLE as error:
            raise bad_configuration(with_error("transformers' default configuration is invalid", error)) from error
        return inspect_family(Path(folder), LoraSpec())


def _reason(message: str) -> str:
    """The part of a message that is about the family."""
    _, _, reason = message.removesuffix(f"; {ALTERNATIVE}").rpartition("trained here: ")
    line = " ".join((reason or message).split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"


def table(entries: Sequence[Entry]) -> str:
    """The module of the types that are trained with one row in a sequence, in Python."""
    names = sorted(found.name for found in entries if found.family is not None and found.family.one_row)
    lines = [
        '"""Names the model types that are trained with one row in a sequence; generated by `make families`."""',
        "",
        "ONE_ROW_MODEL_TYPES = frozenset(",
        "    {",
        *(f'        "{name}",' for name in names),
        "    }",
        ")",
        "",
    ]
    return "\n".join(lines)


def page(known: Sequence[Entry], further: Sequence[Entry]) -> str:
    """The page in Markdown."""
    trained = [found.family for found in known if found.family is not None]
    lines = [
        "# Model families",
        "",
        "<!-- Generated by `make families`. -->",
        "",
        (
            f"transformers {transformers.__version__} has {len(known)} types of causal language models. "
            f"{_summary(trained)} {sum(family.mixture_of_experts for family in trained)} of them are mixtures of "
            "experts, whose experts are in 4-bit and get no adapter."
        ),
        "",
        (
            "`prepare` finds this out from each job's own `config.json`; the table shows what it finds for the "
            "configuration that transformers gives the type by default, with the kinds of blocks that published models "
            "have. Tests train a tiny model of each of them ([Promises](../trainer/promises.md))."
        ),
        "",
        *_table(known),
        "",
        "## Multimodal models",
        "",
        (
            f"It has {len(further)} more types of models that take images, sound or video besides text. "
            f"{_summary([found.family for found in further if found.family is not None])} Only their text part is "
            "trained: towers and projectors stay in 16 bit, are not loaded for training, and get no adapter. The "
            "adapter is one of the whole model, for PEFT and servers "
            "([why](../decisions/0097-adapters-of-whole-multimodal-models.md)). "
            "[Promises](../trainer/promises.md) names those that tests train."
        ),
        "",
        *_table(further),
        "",
    ]
    return "\n".join(lines)


def _summary(trained: Sequence[Family]) -> str:
    one_row = sum(family.one_row for family in trained)
    return (
        f"{len(trained)} can be trained: {len(trained) - one_row} with packed rows, {one_row} with one row in a "
        "sequence."
    )


def _table(entries: Iterable[Entry]) -> Iterator[str]:
    yield "| `model_type` | Trained | |"
    yield "| --- | --- | --- |"
    for found in entries:
        yield f"| `{found.name}` | {_trained(found.family)} | {_remark(found)} |"


def _trained(family: Family | None) -> str:
    if family is None:
        return "no"
    return "one row a sequence" if family.one_row else "packed"


def _remark(found: Entry) -> str:
    if found.family is None:
        return found.reason.replace("|", "\\|")
    return "experts in 4-bit" if found.family.mixture_of_experts else ""


if __name__ == "__main__":
    sys.exit(main())
