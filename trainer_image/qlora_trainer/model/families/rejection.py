"""Gives reasons against training a family, by its configuration or a small model."""

from collections.abc import Iterator

from pydantic import JsonValue
from transformers import PretrainedConfig, PreTrainedModel

from qlora_api.memory.model_shape import LARGEST_SIZES
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.architecture.text_part import auto_class
from qlora_trainer.model.experts.layout import EXPERT_COUNTS, ExpertLayout, reason_against_experts
from qlora_trainer.model.experts.routers import experts_without_router
from qlora_trainer.model.families.probe import Probe
from qlora_trainer.model.nf4.base_weights import reason_against_storage

# Types whose probe passes, although no small model of them could be trained.
_NOT_TRAINED = frozenset({"deepseek_v4"})
# Names of the attention to an encoder in transformers' decoders.
_CROSS_ATTENTION = ("encoder_attn", "crossattention")


def entries(value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    """Every key of nested JSON with its value, outer ones first."""
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


def _inside(value: JsonValue) -> Iterator[tuple[str | None, JsonValue]]:
    """The values inside a list or an object, those of an object with their keys."""
    if isinstance(value, dict):
        return iter(value.items())
    return ((None, inner) for inner in value) if isinstance(value, list) else iter(())


def reason_in_config(config: PretrainedConfig) -> str | None:
    """Why a model of this configuration cannot be trained, or None."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoders are trained"
    if text.model_type in _NOT_TRAINED:
        return "in the tests of this trainer no small model of this type could be trained"
    for name, most in LARGEST_SIZES.items():
        # Each block takes memory even without its weights, and a failure while it is created has any type.
        # Not by attribute, which is an error where blocks differ in it.
        found = vars(text).get(text.attribute_map.get(name, name))
        if isinstance(found, int) and found > most:
            return f"its {name} is {min(found, 10**18)}, and at most {most} are allowed"
    for name, value in entries(config.to_dict()):
        # A tower's configuration sets its number of layers, under another name.
        limit = LARGEST_SIZES.get("num_hidden_layers" if str(name).endswith(("layers", "depth")) else name)
        if limit is not None and isinstance(value, int) and value > limit:
            return f"its {name} is {min(value, 10**18)}, and at most {limit} are allowed"
    if auto_class(config) is None:
        return "transformers has no causal language model of this type"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        # As of PaliGemma, whose processor marks the prompt for it. Without its marks, eager attention is causal, and
        # transformers' default, sdpa, is not.
        return "its tokens attend to later ones (use_bidirectional_attention), which this trainer does not support"
    if getattr(text, "rescale_every", 0):
        return f"it changes its weights between training and use (rescale_every {text.rescale_every})"
    return None


def reason_in_model(model: PreTrainedModel) -> str | None:
    """Why a model's layers, with or without weights, prevent training, or None."""
    unread = reason_against_experts(model) or reason_against_storage(model)
    if unread is not None:
        return unread
    if unrouted := experts_without_router(model):
        return f"it is a mixture of experts ({unrouted}) whose router is not found, which must compute without autocast"
    # A configuration has the family's default count even if none of its blocks has experts (Nemotron-H).
    names_experts = any("expert" in f"{name} {type(module).__name__}".lower() for name, module in model.named_modules())
    if names_experts and not ExpertLayout.from_model(model).stacks:
        for name, value in entries(model.config.get_text_config(decoder=True).to_dict()):
            if name in EXPERT_COUNTS and isinstance(value, int) and value > 1:
                return (
                    f"it is a mixture of experts ({name} {value}) that does not use transformers' interface for "
                    "experts, which 4-bit experts need"
                )
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in _CROSS_ATTENTION:
            return f"it is the decoder of an encoder-decoder, to whose encoder it attends ({name})"
    if not model.supports_gradient_checkpointing:
        return "transformers cannot recompute its blocks in the backward pass (spec.training.gradientCheckpointing)"
    return None


def reason_in_probe(found: Probe) -> str | None:
    """Why the small model of a family prevents training, or None."""
    if found.attention is None:
        return "it computes attention or logits in a way that this trainer does not support"
    if not found.is_causal:
        return "its tokens attend to later ones, which this trainer does not support"
    if not found.is_stateless:
        return "a sequence has an effect on the next one"
    if found.bypassed:
        return f"it computes with the weights of {', '.join(found.bypassed)} themselves, which are packed in 4-bit"
    if not found.is_steady:
        return "in training it computes something else than in use"
    if found.unlike:
        return f"the small test model of the family has other blocks than the whole one ({some_names(found.unlike)})"
    return None
