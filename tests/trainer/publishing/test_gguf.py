"""Adapters as GGUF files: llama.cpp loads them and gives PEFT's answers."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from qlora_api.contract import ExitCode
from qlora_api.spec.output import GgufSpec
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import ADAPTER_FILE, GGUF_FILE
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.source.files import CONFIG
from qlora_trainer.publishing import gguf
from qlora_trainer.publishing.gguf import require_convertible
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import Files
from tests.support.families import BASE
from tests.support.models.llama_cpp import base_gguf, log_probabilities
from tests.support.models.tiny import Recorded, chat_row, save_model, write_rows
from tests.support.resolved import resolved_lora
from tests.support.runs.published import published
from tests.trainer.conftest import MakeContext

TOKENS = [5, 77, 200, 31, 9, 120, 44, 300]
# llama.cpp changes the order of Llama's q and k; Phi-3's are one layer; Qwen3 normalizes them; Gemma's heads are wider.
FAMILIES = {
    "llama": hf.LlamaConfig(**BASE),
    "qwen3": hf.Qwen3Config(**BASE, head_dim=32),
    "phi3": hf.Phi3Config(**BASE),
    "gemma": hf.GemmaConfig(**BASE, head_dim=32),
}


def made(config: PretrainedConfig, folder: Path) -> Path:
    """A random model with large weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def adapted(model: Path, lora: ResolvedLora, folder: Path) -> tuple[Tensor, Tensor]:
    """Save a random adapter. Return log-probabilities after TOKENS, with and without."""
    targets = inspect_family(model, lora).target_modules
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora, target_modules=list(targets))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with_adapter: Any = get_peft_model(base, settings)
    torch.manual_seed(1)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with_adapter.save_pretrained(folder)
    with torch.no_grad():
        found = with_adapter(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
        with with_adapter.disable_adapter():
            without = with_adapter(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    return found, without


def converted(model: Path, lora: ResolvedLora, root: Path, adapter: Path, kind: GgufSpec) -> Path:
    """The GGUF file of an adapter, in the new folder `root`."""
    root.mkdir()
    gguf._convert(adapter / ADAPTER_FILE, model / CONFIG, lora, kind, root / "job")
    return root / GGUF_FILE


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_with_the_file_matches_peft_with_the_adapter(tmp_path: Path, family: str) -> None:
    model, lora = made(FAMILIES[family], tmp_path / "model"), resolved_lora(rank=8, alpha=16, use_rslora=True)
    wanted, without = adapted(model, lora, tmp_path / "adapter")
    file = converted(model, lora, tmp_path / "gguf", tmp_path / "adapter", GgufSpec(type="f32"))

    base = base_gguf(model, tmp_path / "base.gguf")
    found = log_probabilities(base, TOKENS, len(wanted), file)

    assert torch.allclose(log_probabilities(base, TOKENS, len(wanted)), without, atol=0.01)
    assert torch.allclose(found, wanted, atol=0.01)
    assert not torch.allclose(wanted, without, atol=0.5)


def test_shorter_numbers_give_nearly_the_same_answers(tmp_path: Path) -> None:
    model, lora = made(FAMILIES["llama"], tmp_path / "model"), resolved_lora(rank=32, alpha=16)
    wanted, _ = adapted(model, lora, tmp_path / "adapter")
    base = base_gguf(model, tmp_path / "base.gguf")
    # Measured for four families: 0.003 and 0.013.
    for kind, most in ((GgufSpec(), 0.01), (GgufSpec(type="q8_0"), 0.03)):
        file = converted(model, lora, tmp_path / kind.type, tmp_path / "adapter", kind)
        assert {tensor.tensor_type.name.lower() for tensor in GGUFReader(file).tensors} == {kind.type}
        assert torch.allclose(log_probabilities(base, TOKENS, len(wanted), file), wanted, atol=most)


def test_publish_writes_the_file_next_to_the_adapter_and_reports_it(trained: Files) -> None:
    files = trained.with_spec({"output": {"gguf": {}}})

    adapter = published(files).adapter

    folder = files.workspace / "adapter"
    content = (folder / GGUF_FILE).read_bytes()
    assert adapter.gguf is not None
    assert adapter.gguf.dump() == {
        "file": "adapter.gguf",
        "sha256": sha256(content).hexdigest(),
        "sizeBytes": len(content),
        "architecture": "llama",
    }
    assert json.loads((folder / "manifest.json").read_text())["files"][GGUF_FILE]["sha256"] == adapter.gguf.sha256
    card = (folder / "README.md").read_text()
    assert "ADAPTER ./adapter.gguf" in card
    assert not list(files.workspace.glob(".*.partial"))

    # The record is lost in a crash: the next attempt makes the same bytes and finds them published.
    (files.workspace / "records" / "publish.json").unlink()
    assert published(files).adapter == adapter
    assert (folder / GGUF_FILE).read_bytes() == content


def test_prepare_rejects_a_family_that_the_converter_does_not_support(
    tmp_path: Path, make_context: MakeContext
) -> None:
    model = save_model(tmp_path / "models" / "helium", hf.HeliumConfig(**BASE, head_dim=16))
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])

    with pytest.raises(StepFailure, match=r"Model HeliumForCausalLM is not supported; remove output\.gguf") as failure:
        prepare(make_context({"output": {"gguf": {}}}, model=model), Recorded())

    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert list((tmp_path / "workspace").rglob("*.safetensors")) == []


def test_a_layer_that_the_converter_drops_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(FAMILIES["llama"], tmp_path / "model")
    targets = inspect_family(model, resolved_lora()).target_modules
    change_converter("if '.1.mlp.up_proj' in name: continue", tmp_path, monkeypatch)

    with pytest.raises(StepFailure, match="it converts 13 of the 14 layers that have an adapter"):
        require_convertible(model, targets, resolved_lora(), GgufSpec(), tmp_path / "scratch")


def change_converter(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the converter do this too for each `name` and `tensor` of an adapter."""
    program = folder / "llama.cpp" / "convert_lora_to_gguf.py"
    program.parent.mkdir()
    text = gguf.CONVERTER.read_text()
    loop = "for name, tensor in lora_model.items():\n"
    assert loop in text
    program.write_text(text.replace(loop, f"{loop}                    {line}\n"))
    (program.parent / "convert_hf_to_gguf.py").symlink_to(gguf.CONVERTER.parent / "convert_hf_to_gguf.py")
    monkeypatch.setattr(gguf, "CONVERTER", program)


@pytest.mark.parametrize("error", ["TypeError", "AttributeError", "NotImplementedError"])
def test_a_family_whose_layers_the_converter_changes_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    model = made(FAMILIES["llama"], tmp_path / "model")
    targets = inspect_family(model, resolved_lora()).target_modules
    message = "" if error == "NotImplementedError" else "LoraTorchTensor has no x"
    change_converter(f"raise {error}('{message}')", tmp_path, monkeypatch)
    with pytest.raises(StepFailure, match="it changes the form of a layer in a way that no adapter can") as failure:
        require_convertible(model, targets, resolved_lora(), GgufSpec(), tmp_path / "scratch")
    assert "LoraTorchTensor" not in failure.value.message


def test_all_layers_of_the_trial_adapter_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter joins layers with the same A, which no trained adapter has."""
    model = made(FAMILIES["llama"], tmp_path / "model")
    targets = inspect_family(model, resolved_lora()).target_modules
    same = "assert not any(torch.equal(tensor, other) for known, other in lora_model.items() if known < name)"
    change_converter(same, tmp_path, monkeypatch)
    require_convertible(model, targets, resolved_lora(), GgufSpec(), tmp_path / "scratch")


def test_a_split_layer_does_not_hide_a_missing_one_of_another_block(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / GGUF_FILE, "llama")
    for name in ("blk.0.attn_q", "blk.0.attn_k"):
        writer.add_tensor(f"{name}.weight.lora_b", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layers = [f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_B.weight" for block in (0, 1)]
    save_file({name: torch.ones(2, 2) for name in layers}, tmp_path / ADAPTER_FILE)
    found = gguf._architecture_of(tmp_path / GGUF_FILE, tmp_path / ADAPTER_FILE)
    assert str(found) == "it converts 1 of the 2 layers that have an adapter"


def test_the_converter_equals_llama_cpps() -> None:
    folder = gguf.CONVERTER.parent
    rows = [line.split("`") for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]

    sums = {row[1]: row[3] for row in rows}

    assert {name: sha256((folder / name).read_bytes()).hexdigest() for name in sums} == sums
    assert {path.name for path in folder.iterdir()} - {"README.md", "__pycache__"} == set(sums)
