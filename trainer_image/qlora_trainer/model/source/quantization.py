"""Decides whether a model that is quantized already can be trained as it is, from its config.json alone.

Other formats (8-bit, GPTQ, AWQ, FP8) are rejected by name: transformers lets the stored quantization override the
requested one without an error. A model in 4-bit must have the layers in 4-bit that transformers would choose. With some
in 16 bit, as dynamic quantizations keep them, neither the memory estimate nor the minimum share of 4-bit weights would
hold.
"""

import re
from collections.abc import Mapping

from pydantic import JsonValue

from qlora_api.printable import one_line
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration

SETTINGS = ("quantization_config", "compression_config")
"""The keys of config.json under which a quantization is described."""
ORIGINAL = "name the original 16-bit model instead"
_METHOD = "bitsandbytes"
_MXFP4, _MXFP4_FAMILY = "mxfp4", "gpt_oss"
EXPERTS_FORMAT = "experts"
"""Under this name our own base says that its experts are in MXFP4."""
_MAX_NAME = 60
_SKIPPED = "llm_int8_skip_modules"
_MODULE = re.compile(r"\w+(\.\w+)*")
_MOST_SKIPPED = 4096


def source_quantization(config: Mapping[str, JsonValue], place: str) -> QuantizationSpec | None:
    """How the linear layers of a model with this configuration are stored: in bitsandbytes' 4-bit format, or in 16 bit.

    The latter (None) also if only its experts are quantized, to MXFP4, as those of gpt-oss are published.
    `place` names the file in messages. Raises StepFailure BAD_CONFIGURATION for any other quantization.
    """
    found = next((name for name in SETTINGS if name in config), None)
    if found is None:
        return None
    settings = config[found]
    if not isinstance(settings, dict) or found != SETTINGS[0]:
        raise unusable(config, place, found, settings)
    method = settings.get("quant_method")
    if (method, config.get("model_type")) == (_MXFP4, _MXFP4_FAMILY):
        return None
    # Models of 2023 do not name it; transformers goes by this setting as well.
    if settings.get("load_in_4bit") is not True or method not in (None, _METHOD):
        raise unusable(config, place, found, settings)
    kind, double = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_use_double_quant", False)
    if kind not in ("nf4", "fp4") or not isinstance(double, bool) or settings.get("load_in_8bit"):
        raise bad_configuration(
            f"{place} has {found} with bnb_4bit_quant_type {_show(kind)}, bnb_4bit_use_double_quant {_show(double)} "
            f"and load_in_8bit {_show(settings.get('load_in_8bit'))}: allowed are nf4 or fp4, true or false, and no 8 "
            f"bit; {ORIGINAL}"
        )
    if skipped_modules(settings) is None and settings.get(_SKIPPED) is not None:
        # transformers takes each as a regular expression.
        raise bad_configuration(
            f"{place} has {found} with {_SKIPPED} {_show(settings[_SKIPPED])}: allowed is a list of up to "
            f"{_MOST_SKIPPED} names of modules; {ORIGINAL}"
        )
    return QuantizationSpec(type=kind, double_quant=double)


def skipped_modules(settings: Mapping[str, JsonValue]) -> list[str] | None:
    """The modules that bitsandbytes has left in 16 bit.

    None if transformers has chosen them, or if these are no names.
    """
    names = settings.get(_SKIPPED)
    if not isinstance(names, list) or len(names) > _MOST_SKIPPED:
        return None
    found = [name for name in names if isinstance(name, str) and _MODULE.fullmatch(name)]
    return found if len(found) == len(names) else None


def unusable(config: Mapping[str, JsonValue], place: str, name: str, settings: object) -> StepFailure:
    """The failure of a model that is quantized in another format than bitsandbytes' 4 bit.

    `name`: key of the quantization in config.json.
    """
    return bad_configuration(
        f"{place} has {name}: the model (model_type {config.get('model_type')!r}) is already quantized "
        f"({_method(settings)}), and of quantized models only those that bitsandbytes has stored in 4 bit (NF4 or FP4) "
        f"and gpt-oss in MXFP4 are trained as they are; {ORIGINAL}"
    )


def experts_in_mxfp4(config: object) -> bool:
    """Whether the configuration, published or ours, has routed experts in MXFP4."""
    settings = getattr(config, SETTINGS[0], None)
    found = settings if isinstance(settings, dict) else vars(settings) if settings is not None else {}
    return _MXFP4 in (found.get("quant_method"), found.get(EXPERTS_FORMAT))


def require_agreement(found: QuantizationSpec | None, wanted: QuantizationSpec) -> None:
    """Raise StepFailure BAD_CONFIGURATION if the model has another 4-bit format."""
    if found is not None and found != wanted:
        raise bad_configuration(
            f"spec.quantization is type {wanted.type}, doubleQuant {_show(wanted.double_quant)}, and the model is "
            f"stored in 4 bit as type {found.type}, doubleQuant {_show(found.double_quant)} (quantization_config in "
            "its config.json). It is not quantized again: set spec.quantization to that, or name the original "
            "16-bit model"
        )


def _method(settings: object) -> str:
    if not isinstance(settings, dict):
        return "by an unnamed method"
    method = settings.get("quant_method")
    if settings.get("load_in_8bit") and method in (None, _METHOD):
        return "bitsandbytes' 8 bit, load_in_8bit"
    return one_line(str(method or "by an unnamed method"))[:_MAX_NAME]


def _show(value: object) -> str:
    return str(value).lower()[:_MAX_NAME] if isinstance(value, bool) else repr(value)[:_MAX_NAME]
