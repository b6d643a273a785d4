"""The adapter as a GGUF file, for llama.cpp and Ollama: `spec.output.gguf`, what it excludes, and its status."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from qlora_api.schema import ApiModel, ObservedModel, rule

if TYPE_CHECKING:
    from qlora_api.v1alpha1 import QLoRAJobSpec


class GgufSpec(ApiModel):
    """The adapter as a GGUF file too, beside adapter_model.safetensors."""

    type: Literal["f16", "f32", "q8_0"] = Field(
        default="f16",
        description="Type of its numbers: 16 or 32 bits, or 8 with a scale for each 32 (in matrices whose rows are no "
        "multiple of 32, such as those of a smaller rank, f16).",
    )


class GgufStatus(ObservedModel):
    """The adapter's GGUF file."""

    file: str = Field(max_length=256, description="Its name in the adapter's folder.")
    sha256: str = Field(max_length=64, pattern=r"^[0-9a-f]{64}$", description="Its SHA-256.")
    size_bytes: int = Field(ge=0, le=2**53, description="Its size.")
    architecture: str = Field(
        max_length=64, description="llama.cpp's name of the base's architecture; only a GGUF of such a base loads it."
    )


class _Excluded(NamedTuple):
    """A setting with which there is no GGUF file, and why."""

    field: str
    absent: str
    """CEL, on the spec: that it is not set."""
    is_set: Callable[["QLoRAJobSpec"], bool]
    reason: str


_EXCLUDED = (
    _Excluded(
        "lora.useDora",
        "!self.lora.useDora",
        lambda spec: spec.lora.use_dora,
        "llama.cpp knows no magnitudes of DoRA",
    ),
    _Excluded(
        "lora.modulesToSave",
        "!has(self.lora.modulesToSave)",
        lambda spec: spec.lora.modules_to_save is not None,
        "llama.cpp loads no fully trained modules from an adapter",
    ),
    _Excluded(
        "lora.initialization: loftq",
        "self.lora.initialization == 'default'",
        lambda spec: spec.lora.initialization != "default",
        "such an adapter also corrects the rounding of its own 4-bit base, which llama.cpp does not load",
    ),
)


def gguf_rules() -> list[dict[str, Any]]:
    """The rules of a spec with output.gguf, which `reject_unconvertible` knows too."""
    return [rule(f"!has(self.output.gguf) || {each.absent}", _message(each)) for each in _EXCLUDED]


def reject_unconvertible(spec: "QLoRAJobSpec") -> None:
    """Raise ValueError if the job asks for a GGUF file that would not give the adapter's answers."""
    if spec.output.gguf is None:
        return
    for each in _EXCLUDED:
        if each.is_set(spec):
            raise ValueError(_message(each))


def _message(excluded: _Excluded) -> str:
    return f"output.gguf is not possible with {excluded.field}, as {excluded.reason}: remove one of them"
