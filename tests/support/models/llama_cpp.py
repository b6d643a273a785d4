"""A real llama.cpp: a tiny model as a GGUF file that it loads, and its results with an adapter."""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from gguf import LlamaFileType
from torch import Tensor

from qlora_trainer.core.sandbox import within_limits
from qlora_trainer.publishing.gguf import CONVERTER


def base_gguf(model: Path, path: Path) -> Path:
    """Write a folder's model as a 32-bit GGUF file with a vocabulary of token ids."""
    within_limits(_write_base, (model, path), what="the test's base")
    return path


def _write_base(model: Path, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"NO_LOCAL_GGUF": "1", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(CONVERTER.parent))
    converter = importlib.import_module("convert_hf_to_gguf")
    settings: dict[str, Any] = converter.ModelBase.load_hparams(model, False)
    architecture = converter.get_model_architecture(settings, converter.ModelType.TEXT)
    kind = converter.ModelBase.from_model_architecture(architecture)

    class WithPlainVocabulary(kind):  # type: ignore[misc, valid-type]
        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            size = (self.hparams.get("text_config") or self.hparams)["vocab_size"]
            self.gguf_writer.add_tokenizer_model("gpt2")
            self.gguf_writer.add_tokenizer_pre("default")
            self.gguf_writer.add_token_list([f"<{number}>" for number in range(size)])
            self.gguf_writer.add_token_types([1] * size)
            self.gguf_writer.add_token_merges(["< 1"])

    with torch.inference_mode():
        WithPlainVocabulary(model, LlamaFileType.ALL_F32, path, hparams=settings).write()


def log_probabilities(base: Path, tokens: Sequence[int], vocabulary: int, adapter: Path | None = None) -> Tensor:
    """llama.cpp's log-probabilities of the token after these: [vocabulary]."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    request = {"prompt": list(tokens), "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    found = torch.full((vocabulary,), float("-inf"))
    for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found
