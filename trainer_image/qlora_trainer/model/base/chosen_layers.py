"""Decides which layers of a model become 4-bit, as transformers and bitsandbytes decide it."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.architecture.text_part import parts_beside_text, without_weights
from qlora_trainer.model.experts.quantizer import ExpertsConfig
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.model.source.files import CONFIG
from qlora_trainer.model.source.quantization import ORIGINAL


def library_config(
    quantization: QuantizationSpec,
    storage_dtype: torch.dtype = torch.uint8,
    *,
    experts: bool,
    in_16_bit: tuple[str, ...] = (),
) -> BitsAndBytesConfig:
    """The quantization as transformers' configuration."""
    settings = ExpertsConfig if experts else BitsAndBytesConfig
    return settings(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=BASE_DTYPE,
        bnb_4bit_quant_storage=storage_dtype,
        llm_int8_skip_modules=list(in_16_bit) or None,
    )


def modules_in_16_bit(config_folder: Path) -> tuple[str, ...]:
    """All modules that stay in 16 bit, or none if transformers would choose the same."""
    # Before weights are tied, as in `quantized_names`.
    with no_tie_weights():
        model = unloaded_model(config_folder)
    beside = parts_beside_text(model)
    return tuple(sorted({*HfQuantizer.get_modules_to_not_convert(model), *beside})) if beside else ()


def quantized_names(config_folder: Path, settings: BitsAndBytesConfig) -> frozenset[str]:
    """The names of the weights that transformers quantizes with these settings."""
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    # The library chooses before it ties weights, and what it sees as the last one depends on that.
    with no_tie_weights():
        replaced = unloaded_model(config_folder)
    quantizer.preprocess_model(replaced, device_map={"": "cpu"})
    layers = (name for name, module in replaced.named_modules() if isinstance(module, Linear4bit))
    return frozenset(f"{layer}.weight" for layer in layers)


def require_same_layers(theirs: frozenset[str], ours: frozenset[str]) -> None:
    """Raise StepFailure if stored 4-bit layers are not those of a job."""
    if theirs != ours:
        in_16_bit, in_4_bit = map(some_names, (ours - theirs, theirs - ours))
        raise bad_configuration(
            f"{CONFIG} describes a model whose 4-bit layers are not those that a job has: it has {in_16_bit} in 16 bit "
            f"and {in_4_bit} in 4 bit instead (llm_int8_skip_modules); {ORIGINAL}"
        )


def unloaded_model(config_folder: Path) -> PreTrainedModel:
    """Build the model of a folder without reading its weights."""
    config = AutoConfig.from_pretrained(config_folder, local_files_only=True, trust_remote_code=False)
    return without_weights(config, dtype=BASE_DTYPE)
