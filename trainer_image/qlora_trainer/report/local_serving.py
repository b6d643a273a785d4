"""Makes the Modelfile and command for a GGUF file in Ollama and llama.cpp."""

from collections.abc import Iterator, Mapping

from qlora_trainer.core.file_names import GGUF_FILE
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.render.template_source import TEMPLATE_FILE

BASE_GGUF_PLACEHOLDER = "PATH/OF/THE/BASE/MODEL.gguf"


def gguf_commands(job: TrainedJob, adapter: str) -> Mapping[str, str]:
    """Command and file by the name of the tool that reads it, or empty without a GGUF.

    Both need a GGUF file of the base, in any quantization. `adapter` is the adapter's folder.
    """
    if job.spec.output.gguf is None:
        return {}
    own_template = "" if job.prepared.template_sha256 is None else f" --chat-template-file {adapter}/{TEMPLATE_FILE}"
    return {
        "Ollama, as Modelfile": "\n".join(_modelfile(job, adapter)),
        "llama.cpp": f"llama-server --model {BASE_GGUF_PLACEHOLDER} --lora {adapter}/{GGUF_FILE}{own_template}",
    }


def _modelfile(job: TrainedJob, adapter: str) -> Iterator[str]:
    yield f"FROM {BASE_GGUF_PLACEHOLDER}"
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
