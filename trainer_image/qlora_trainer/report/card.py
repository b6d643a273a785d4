"""Writes the model card of an adapter: what it is, what it was trained on, and how to load and serve it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from qlora_api.sources import HubSource, parse_source
from qlora_api.training import LoraSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.file_names import CURVE_FILE
from qlora_trainer.report.serving import refused_by_vllm, served_rank

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def quantization_label(quantization: str, *, double: bool) -> str:
    """How the base was held, for people: `nf4 with double quantization`."""
    return f"{quantization} with double quantization" if double else quantization


def variant_label(lora: LoraSpec) -> str:
    """Which variant of LoRA it is, for people: `rsLoRA, LoftQ, blocks 0, 1`."""
    parts = [
        "rsLoRA" if lora.use_rslora else "",
        "DoRA" if lora.use_dora else "",
        "LoftQ" if lora.initialization == "loftq" else "",
        f"blocks {', '.join(map(str, lora.layers_to_transform))}" if lora.layers_to_transform else "",
        f"{' and '.join(lora.modules_to_save)} trained whole" if lora.modules_to_save else "",
    ]
    return ", ".join(part for part in parts if part) or "LoRA"


def model_card(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> str:
    """The card as Markdown with the hub's metadata block. The same job gives the same text."""
    spec = context.spec
    hub = isinstance(parse_source(spec.model.source), HubSource)
    base = context.base_name
    data = ModelCardData(
        base_model=base if hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "qlora"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=context.document.metadata.name,
        base=base,
        base_path=base if hub else "PATH/OF/THE/BASE/MODEL",
        hub=hub,
        spec=spec,
        prepared=prepared,
        trained=trained,
        curve=CURVE_FILE,
        quantization=quantization_label(spec.quantization.type, double=spec.quantization.double_quant),
        modules=", ".join(sorted({name.rpartition(".")[2] for name in prepared.target_modules})),
        batch=spec.training.micro_batch_size * spec.training.gradient_accumulation_steps,
        served_rank=served_rank(spec.lora),
        refused_by_vllm=refused_by_vllm(spec.lora),
        variant=variant_label(spec.lora),
        loss=lambda value: "–" if value is None else f"{value:.4f}",
    )
    return f"{str(card).rstrip()}\n"
