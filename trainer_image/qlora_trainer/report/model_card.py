"""Writes model cards of adapters, merged models and bases, with usage."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from qlora_api.artifact_status import BenchmarkStatus, GateStatus, GuardStatus
from qlora_api.printable import printable
from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.gate import MAX_PROMPT_TOKENS
from qlora_api.spec.output import BaseType
from qlora_api.spec.resolved import ResolvedLora
from qlora_api.spec.training import PreferenceSpec, QuantizationSpec
from qlora_trainer.core.file_names import CURVE_FILE
from qlora_trainer.core.outcome import steps_done
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.history.metrics_log import MetricsHistory
from qlora_trainer.report.learning import learned_little
from qlora_trainer.report.serving import (
    gguf_commands,
    peft_program,
    rejected_by_vllm,
    request_command,
    served_base,
    served_rank,
    template_option,
)

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_THIS_FOLDER = "PATH/OF/THIS/FOLDER"
TRAINED_ON = {
    "completion": "completions only",
    "last": "the last answer of each row only",
    "weighted": "completions, without those of weight 0",
    "marked": "the answers that the rows mark only",
    "all": "all tokens",
}
"""What `spec.training.trainOn` means, for people."""


def quantization_label(quantization: QuantizationSpec) -> str:
    """How the base was stored, for people: `nf4 with double quantization`."""
    return f"{quantization.type} with double quantization" if quantization.double_quant else quantization.type


def variant_label(lora: ResolvedLora) -> str:
    """Which variant of LoRA it is, for people: `rsLoRA, blocks 0, 1`."""
    parts = [
        "rsLoRA" if lora.use_rslora else "",
        "DoRA" if lora.use_dora else "",
        f"blocks {', '.join(map(str, lora.layers_to_transform))}" if lora.layers_to_transform else "",
        f"{' and '.join(lora.modules_to_save)} fully trained" if lora.modules_to_save else "",
    ]
    return ", ".join(part for part in parts if part) or "LoRA"


def gate_data_text(gate: GateStatus) -> str:
    """The data of a gate's losses and score, for people: sentences, or nothing."""
    sentences = []
    if gate.eval_tokens is not None:
        sentences.append(f"The held-out losses are means over {gate.eval_tokens:,} target tokens.")
    sentences += map(_guard_text, gate.guards or ())
    sentences += map(_benchmark_text, gate.benchmarks or ())
    if too_long := sum(measured.score_too_long_rows or 0 for measured in (gate, *(gate.guards or ()))):
        sentences.append(
            f"The held-out rows that were not answered, {too_long:,}, have a prompt of more than {MAX_PROMPT_TOKENS} "
            "tokens."
        )
    return " ".join(sentences)


def _benchmark_text(benchmark: BenchmarkStatus) -> str:
    return (
        f"On {benchmark.rows:,} rows of benchmark {benchmark.task} {benchmark.metric} is {benchmark.base_score:.4f} "
        f"without the adapter and {benchmark.score:.4f} with it."
    )


def _guard_text(guard: GuardStatus) -> str:
    losses = (
        f"On the {guard.tokens:,} target tokens of guard {guard.name} the mean loss is {guard.base_loss:.4f} without "
        f"the adapter and {guard.loss:.4f} with it"
    )
    if guard.score is None or guard.base_score is None:
        return f"{losses}."
    passed = f"{guard.base_score:.1%} pass without it and {guard.score:.1%} with it"
    return f"{losses}; of {guard.score_rows:,} answers {passed}."


def adapter_model_card(job: TrainedJob, history: MetricsHistory) -> str:
    """The adapter's model card as Markdown with metadata, the same for the same job."""
    spec, prepared = job.spec, job.prepared
    hub = isinstance(parse_source(spec.model.source), HubSource)
    data = ModelCardData(
        base_model=job.base_name if hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "qlora"],
    )
    model_card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=job.name,
        base=job.base_name,
        served=served_base(job),
        hub=hub,
        spec=spec,
        preference=PreferenceSpec(),
        prepared=prepared,
        trained=job.trained,
        learned=learned_little(job.trained, history),
        steps=steps_done(job.trained.training_step, job.trained.total_steps, job.trained.kept_step),
        gate=job.gate,
        judged_on="" if job.gate is None else gate_data_text(job.gate),
        continued=job.continued,
        accuracy=(history.held_out_accuracy(0), history.held_out_accuracy(job.trained.kept_step)),
        margin=history.reward_margin.values[-1] if history.compares_answers else None,
        curve=CURVE_FILE,
        quantization=quantization_label(spec.quantization),
        modules=", ".join(sorted({name.rpartition(".")[2] for name in prepared.target_modules})),
        batch=spec.training.micro_batch_size * spec.training.gradient_accumulation_steps,
        served_rank=served_rank(spec.lora),
        rejected_by_vllm=rejected_by_vllm(spec.lora),
        variant=variant_label(spec.lora),
        has_chat_template=job.has_chat_template,
        program=peft_program(job, _THIS_FOLDER),
        template_option=template_option(job, _THIS_FOLDER),
        request=request_command(job),
        gguf=gguf_commands(job, "."),
        end_text=printable(prepared.end_of_turn.text if prepared.end_of_turn else ""),
        trained_on=TRAINED_ON[spec.training.train_on],
        loss=lambda value: "–" if value is None else f"{value:.4f}",
    )
    return f"{str(model_card).rstrip()}\n"


def merged_model_card(job: TrainedJob, loss: float | None) -> str:
    """The merged model's model card as Markdown. `loss` (nats) is None if unmeasured."""
    compared = job.trained.compared
    comparison = "No rows were held out, so the merged model was not compared with the adapter."
    if compared is not None and loss is not None:
        comparison = (
            f"Loss on {compared.targets} held-out target tokens (nats): {loss:.4f} merged, {compared.loss:.4f} with "
            "the adapter on its 4-bit base."
        )
    return f"""# {job.name}, merged

The adapter of this job merged into `{job.base_name}` (`{job.prepared.model_revision}`), in bfloat16. Load it like any
other model, without an adapter.

{comparison}

The base weights in this model are those that the adapter was trained on, dequantized from
{quantization_label(job.spec.quantization)}. They differ from the original weights by the quantization error.

Do not quantize this model to 4-bit without measuring the result: the rounding error can be as large as the adapter's
effect. To serve in 4-bit, load the original model in 4-bit and the adapter on top of it.
"""


def base_model_card(job: TrainedJob, base_type: BaseType) -> str:
    """The model card of a published base as Markdown. Names the base as the job does."""
    quantization = quantization_label(job.spec.quantization)
    if base_type == "quantized":
        name, form = "in 4-bit", f"in {quantization}, as adapters were\ntrained on it"
        loading = "Load it like any other model that\nbitsandbytes has quantized"
    else:
        name = "dequantized"
        form = f"dequantized to bfloat16 from\n{quantization}, with the weights that adapters were trained on"
        loading = "Load it like any\nother model, unquantized"
    return f"""# {job.base_name}, {name}

`{job.base_name}` (`{job.prepared.model_revision}`) {form}: with these
they give the answers that were measured in training. {loading}, and an adapter on top of it:

```python
from peft import PeftModel
from transformers import {job.prepared.auto_class}, AutoTokenizer

base = {job.prepared.auto_class}.from_pretrained("PATH/OF/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")
model = PeftModel.from_pretrained(base, "PATH/OF/THE/ADAPTER")
```

SHA-256 over the lines `SHA-256  NAME` of the weights in 4-bit, their `config.json` and what belongs to them:
`{job.trained.base_sha256}`. `manifest.json` lists the SHA-256 of each file.
"""
