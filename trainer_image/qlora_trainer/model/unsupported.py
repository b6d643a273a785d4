"""Gives the reason why models of a family cannot be trained, from their configuration and their layers."""

from collections.abc import Iterator
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_api.memory.model_shape import LARGEST_SIZES
from qlora_trainer.model.expert_layout import EXPERT_COUNTS, ExpertLayout, reason_against_experts

ALTERNATIVE = "choose a dense decoder, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, OLMo 2, SmolLM3 or Granite"
_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})
# Multimodal families of which the text decoder is trained, under the names in files that servers expect.
_TRAINED_TEXT_PARTS = frozenset({"gemma3"})
_RECURRENT = "it carries a state from token to token, which would leak from one packed row into the next"


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value, at any depth, each before those inside it."""
    # Not recursive: JSON may nest deeper than calls may.
    begun = [_inside(value)]
    while begun:
        for key, inner in begun[-1]:
            if key is not None:
                yield key, inner
            begun.append(_inside(inner))
            break
        else:
            begun.pop()


def _inside(value: Any) -> Iterator[tuple[str | None, Any]]:
    """The values inside a list or an object, those of an object with their keys."""
    if isinstance(value, dict):
        return iter(value.items())
    return ((None, inner) for inner in value) if isinstance(value, list) else iter(())


def reason_in_config(config: Any) -> str | None:
    """Why a model of this configuration cannot be trained, as far as the configuration shows; None if it can."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoders are trained"
    for name, most in LARGEST_SIZES.items():
        # Each block takes memory even without its weights, and a failure while it is created has any type.
        if isinstance(found := getattr(text, name, None), int) and found > most:
            return f"its {name} is {min(found, 10**18)}, and at most {most} are allowed"
    if text is not config and config.model_type not in _TRAINED_TEXT_PARTS:
        return "it is a multimodal model, and only models of text are trained"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION_KINDS)
    return f"it has layers of type {', '.join(other)}: {_RECURRENT}" if other else None


def reason_in_model(model: Any) -> str | None:
    """Why a model, with or without weights, cannot be trained, as far as its layers show; None if it can."""
    unread = reason_against_experts(model)
    if unread is not None:
        return unread
    if not ExpertLayout.of(model).stacks:
        for name, value in entries(model.config.get_text_config(decoder=True).to_dict()):
            if name in EXPERT_COUNTS and isinstance(value, int) and value > 1:
                return (
                    f"it is a mixture of experts ({name} {value}) that does not use transformers' interface for "
                    "experts, by which they are kept in 4-bit"
                )
    # Private, but what transformers itself asks before it generates.
    if model._is_stateful:
        return _RECURRENT
    if not model.is_backend_compatible():
        return "its attention is implemented separately in transformers (as with ALiBi biases), which mixes packed rows"
    return None
