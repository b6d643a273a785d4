"""Makes the commands that load an adapter in PEFT, vLLM, Ollama and llama.cpp."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec
from qlora_trainer.core.file_names import GGUF_FILE
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.render.template_source import TEMPLATE_FILE

logger = logging.getLogger(__name__)

# Values for vLLM's --max-lora-rank. Its default is 16.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ADAPTER_PLACEHOLDER = "PATH/OF/THE/ADAPTER"
BASE_PLACEHOLDER = "PATH/OF/THE/BASE/MODEL"
_BASE_GGUF = f"{BASE_PLACEHOLDER}.gguf"


def served_rank(lora: ResolvedLora) -> int | None:
    """The smallest --max-lora-rank of vLLM for the adapter, or None if unsupported."""
    if rejected_by_vllm(lora) is not None:
        return None
    return next(allowed for allowed in _VLLM_RANKS if allowed >= lora.rank)


def rejected_by_vllm(lora: ResolvedLora) -> str | None:
    """Why vLLM does not load such an adapter, as a sentence's end, or None."""
    reasons = {
        "it does not support DoRA (spec.lora.useDora)": lora.use_dora,
        "it does not load fully trained modules (spec.lora.modulesToSave)": lora.modules_to_save is not None,
        f"its rank {lora.rank} is above the {max(_VLLM_RANKS)} that vLLM allows": lora.rank > max(_VLLM_RANKS),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def warn_if_not_served(spec: ResolvedSpec) -> None:
    """Log a warning if vLLM loads neither the adapter nor a merged model."""
    rejected = rejected_by_vllm(spec.lora)
    if rejected is not None and spec.output.merged is None:
        logger.warning("vLLM will not serve the adapter: %s; spec.output.merged makes a model that it serves", rejected)


@dataclass(frozen=True)
class ServedBase:
    """The base to load an adapter on."""

    path: str
    """As libraries take it."""
    revision: str | None
    is_trained_base: bool
    """Whether it has the weights of training, and needs no settings to be loaded."""


def served_base(job: TrainedJob) -> ServedBase:
    """The published base, or else the model that the job names, with placeholders."""
    published = job.spec.output.base
    source = parse_source(job.spec.model.source if published is None else published.destination)
    path = source.repository if isinstance(source, HubSource) else BASE_PLACEHOLDER
    pinned = published is None and isinstance(source, HubSource)
    return ServedBase(path, job.prepared.model_revision if pinned else None, is_trained_base=published is not None)


def serving_commands(job: TrainedJob) -> Mapping[str, str]:
    """Commands and programs by tool, to paste with the adapter's path."""
    base = served_base(job)
    commands = {"PEFT": peft_program(job, ADAPTER_PLACEHOLDER)}
    rank = served_rank(job.spec.lora)
    if rank is not None:
        pinned = f" --revision {base.revision}" if base.revision else ""
        commands["vLLM"] = (
            f"vllm serve {base.path}{pinned} \\\n  --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {job.name}={ADAPTER_PLACEHOLDER}{template_option(job, ADAPTER_PLACEHOLDER)}"
        )
    request = request_command(job)
    if request is not None:
        commands["Request to vLLM"] = request
    return {**commands, **gguf_commands(job, ADAPTER_PLACEHOLDER)}


def template_option(job: TrainedJob, adapter: str) -> str:
    """The option of vLLM for a job's chat template. `adapter`: the adapter's folder."""
    return "" if job.prepared.template_sha256 is None else f" \\\n  --chat-template {adapter}/{TEMPLATE_FILE}"


def peft_program(job: TrainedJob, adapter: str) -> str:
    """A program that prints an answer, on a base most like the trained one. `adapter`: the adapter's folder."""
    base, auto_class = served_base(job), job.prepared.auto_class
    kind, settings = loading_settings(job)
    if base.is_trained_base:
        loading = f"""from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained("{base.path}")"""
    else:
        pinned = f', revision="{base.revision}"' if base.revision else ""
        loading = f"""import torch
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer, {kind}

base = {auto_class}.from_pretrained(
    "{base.path}"{pinned},
    quantization_config={settings},
)"""
    end = job.prepared.end_of_turn
    # The text comes from an untrusted tokenizer, and a line break would end the string or the comment.
    text, lines, stop = json.dumps("" if end is None else end.text, ensure_ascii=False), [], ""
    if end is not None and end.token is not None:
        lines = [f"model.generation_config.eos_token_id = {[*end.known, end.token]}  # {text} ends an answer"]
    elif end is not None and end.text:
        stop = f", stop_strings=[{text}], tokenizer=tokenizer"
    return "\n".join(
        [
            loading,
            f'tokenizer = AutoTokenizer.from_pretrained("{adapter}")',
            f'model = PeftModel.from_pretrained(base, "{adapter}")',
            *lines,
            "",
            *_prompt(job),
            f"answer = model.generate(**prompt, max_new_tokens=200{stop})[0, prompt.input_ids.shape[1] :]",
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    )


def _prompt(job: TrainedJob) -> list[str]:
    """The lines that write a prompt as the rows were written."""
    if not job.has_chat_template or job.prepared.dataset.format == "text":
        return ['prompt = tokenizer("…", return_tensors="pt").to(model.device)']
    return [
        f"messages = {_messages(job)}",
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
    ]


def _messages(job: TrainedJob) -> str:
    """A question after the job's system message, as JSON."""
    system = job.spec.dataset.system_prompt
    said = [] if system is None else [{"role": "system", "content": system.text}]
    return json.dumps([*said, {"role": "user", "content": "…"}], ensure_ascii=False)


def request_command(job: TrainedJob) -> str | None:
    """A request with training's system message and end of answer, or None."""
    end, system = job.prepared.end_of_turn, job.spec.dataset.system_prompt
    fields = [f'"model": {json.dumps(job.name)}']
    fields.append(f'"messages": {_messages(job)}')
    if end is not None and end.text:
        fields.append(end.request_field)
    elif system is None:
        return None
    body = shlex.quote(f"{{{', '.join(fields)}}}")
    return f"curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d {body}"


def loading_settings(job: TrainedJob) -> tuple[str, str]:
    """The class and settings of transformers for a base most like the trained one."""
    if job.prepared.experts_in_mxfp4:
        # transformers does not combine it with another quantization.
        return "Mxfp4Config", "Mxfp4Config(dequantize=True),\n    dtype=torch.bfloat16"
    quantization = job.spec.quantization
    return (
        "BitsAndBytesConfig",
        f"""BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="{quantization.type}",
        bnb_4bit_use_double_quant={quantization.double_quant},
        bnb_4bit_compute_dtype=torch.bfloat16,
    )""",
    )


def gguf_commands(job: TrainedJob, adapter: str) -> Mapping[str, str]:
    """Command and file by tool for the folder `adapter`, or empty without a GGUF."""
    if job.spec.output.gguf is None:
        return {}
    own_template = "" if job.prepared.template_sha256 is None else f" --chat-template-file {adapter}/{TEMPLATE_FILE}"
    return {
        "Ollama, as Modelfile": "\n".join(_modelfile(job, adapter)),
        "llama.cpp": f"llama-server --model {_BASE_GGUF} --lora {adapter}/{GGUF_FILE}{own_template}",
    }


def _modelfile(job: TrainedJob, adapter: str) -> Iterator[str]:
    yield f"FROM {_BASE_GGUF}"
    yield f"ADAPTER {adapter}/{GGUF_FILE}"
    if job.prepared.template_sha256 is not None:
        yield f"# TEMPLATE: write {TEMPLATE_FILE}, the template of the rows, in Ollama's syntax."
    system, end = job.spec.dataset.system_prompt, job.prepared.end_of_turn
    if system is not None:
        yield from _setting("SYSTEM", '"""', system.text)
    if end is not None and end.text:
        yield from _setting("PARAMETER stop", '"', end.text)


def _setting(name: str, quote: str, text: str) -> Iterator[str]:
    """The setting, or a comment if neither Ollama nor Markdown can hold its text."""
    if '"' in text or "```" in text or (quote == '"' and not text.isprintable()):
        yield f"# {name}: a text that cannot be written here; see the job's settings"
    else:
        yield f"{name} {quote}{text}{quote}"
