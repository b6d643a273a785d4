"""The merged model is the trained function, in files that transformers loads."""

import ctypes
import dataclasses
import gc
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config, Qwen2Config

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.completion import Comparison, PrepareRecord, PublishRecord, TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset
from qlora_trainer.evaluation import held_out
from qlora_trainer.model.adapter.attach import attach_adapter, save_adapter
from qlora_trainer.model.adapter.merge import BYTES_PER_ENTRY, MergeSource
from qlora_trainer.model.architecture.dequantized_model import bytes_to_write, model_without_weights, write_model
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.publishing import merged_model as publish_merged
from qlora_trainer.publishing.merged_model import merge
from qlora_trainer.steps.publish import publish
from tests.support.families import FAMILIES, tiny_config
from tests.support.models.four_bit import convert
from tests.support.models.sequences import rows_of
from tests.support.models.tiny import JOB_UID, SHAPE, Recorded, save_model
from tests.support.resolved import resolved_lora
from tests.support.runs.forks import server
from tests.support.runs.report_page import Page
from tests.support.training import prepared, run

NF4 = QuantizationSpec()
TIED_LLAMA = LlamaConfig(**SHAPE, tie_word_embeddings=True)
BIASED_QWEN2 = Qwen2Config(**SHAPE, tie_word_embeddings=False)
FUSED_PHI3 = Phi3Config(**SHAPE, pad_token_id=0)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied-rslora": (TIED_LLAMA, {"useRslora": True}),
    "biased-dora-one-block": (BIASED_QWEN2, {"useDora": True, "layersToTransform": [1]}),
    "multimodal": (FAMILIES["gemma3"][0], {}),
    "fused-whole-head": (FUSED_PHI3, {"modulesToSave": ["lm_head"], "targetModules": ["qkv_proj", "down_proj"]}),
}


def published(context: StepContext) -> PublishRecord:
    return publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


@pytest.fixture(scope="session", params=CASES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[StepContext, Path]:
    """A job whose merged model is published, and its base. Do not change it: copy it."""
    config, lora = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "model", config)
    context = prepared(root / "workspace", model, {"lora": lora, "output": {"merged": {}}})
    run(context)
    published(context)
    return context, model


@pytest.fixture
def trained(tmp_path: Path, merged: tuple[StepContext, Path]) -> StepContext:
    """A copy of such a job, before publish."""
    context, _ = merged
    shutil.copytree(context.workspace.root, tmp_path / "job")
    copy = dataclasses.replace(context, workspace=WorkspaceLayout(tmp_path / "job"))
    shutil.rmtree(copy.workspace.merged)
    shutil.rmtree(copy.workspace.adapter)
    copy.workspace.completion("publish").unlink()
    return copy


def test_each_weight_is_the_dequantized_one_and_the_adapters_part_rounded_once(
    merged: tuple[StepContext, Path],
) -> None:
    context, model = merged
    base = load_base(model, NF4, "cpu")
    held = {
        name: dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in base.named_modules()
        if isinstance(layer, Linear4bit)
    }
    peft = PeftModel.from_pretrained(base, str(context.workspace.adapter))
    layers = dict(peft.get_base_model().named_modules())
    found = load_file(context.workspace.merged / "model.safetensors")

    assert held
    for name, weight in held.items():
        layer, expected = layers[name], weight.float()
        if hasattr(layer, "lora_A"):
            expected = expected + layer.get_delta_weight("default")
            if context.spec.lora.use_dora:
                magnitude = layer.lora_magnitude_vector["default"].weight
                expected = expected * (magnitude / expected.norm(dim=1)).unsqueeze(1)
        merged_tensor = found.pop(f"{name}.weight")
        # Half of the last of bfloat16's eight bits, and of float32's where the sum is near zero.
        assert torch.allclose(merged_tensor.float(), expected.detach(), rtol=2**-8 * 1.001, atol=1e-8)
    original = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).named_parameters())
    whole = load_file(context.workspace.adapter / "adapter_model.safetensors")
    for name, tensor in found.items():
        expected = whole.get(f"base_model.model.{name}", original[name])
        assert torch.equal(tensor, expected)
    assert found.keys() | {f"{name}.weight" for name in held} == set(original)


def test_any_server_can_load_the_merged_model_and_both_losses_are_reported(merged: tuple[StepContext, Path]) -> None:
    context, _ = merged
    folder = context.workspace.merged
    config = json.loads((folder / "config.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    status = json.loads(context.workspace.completion("publish").read_text())["merged"]

    # safetensors writes files that only their owner may read; a server may run as another user.
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert status["uri"] == f"{context.workspace_uri}/merged"
    assert status["sizeBytes"] == sum(parameter.nbytes for parameter in model.parameters())
    assert status["evalLoss"] == pytest.approx(status["adapterEvalLoss"], rel=2e-3)
    assert status["adapterEvalLoss"] == pytest.approx(
        json.loads(context.workspace.completion("train").read_text())["evalLoss"], rel=1e-5
    )
    assert status["evalTokens"] == 26
    model_card = (folder / "README.md").read_text()
    assert f"{status['evalLoss']:.4f} merged" in model_card
    assert "Do not quantize this model to 4-bit without measuring the result" in model_card


def test_card_and_page_name_settings_that_vllm_rejects_and_the_page_has_both_losses(
    merged: tuple[StepContext, Path],
) -> None:
    context, _ = merged
    status = json.loads(context.workspace.completion("publish").read_text())
    model_card = " ".join((context.workspace.adapter / "README.md").read_text().split())
    page = Page((context.workspace.report / "report.html").read_text()).words
    lora, told = context.spec.lora, status["merged"]

    rejected = "vLLM cannot serve this adapter: "
    if lora.use_dora:
        rejected += "it does not support DoRA (spec.lora.useDora)."
    elif lora.modules_to_save:
        rejected += "it does not load fully trained modules (spec.lora.modulesToSave)."
    served = not (lora.use_dora or lora.modules_to_save)
    for text in (model_card, page):
        assert (rejected in text) != served
        assert ("vllm serve" in text) == served
    assert status["adapter"].get("servedRank") == (8 if served else None)
    compared = f"the adapter has {told['adapterEvalLoss']:.4f} on the same {told['evalTokens']} tokens"
    assert f"Held-out loss, merged {told['evalLoss']:.4f} {compared}" in page
    assert f"The merged model is at {told['uri']} , in bfloat16" in page


def test_only_a_damaged_merged_model_is_merged_again(trained: StepContext) -> None:
    first = published(trained)
    file = trained.workspace.merged / "model.safetensors"
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert published(trained) == first
    assert file.stat().st_mtime_ns == written

    file.write_bytes(content[:-1])
    assert published(trained) == first
    assert file.read_bytes() == content
    assert not list(trained.workspace.root.glob(".*"))


def flipped(path: Path) -> None:
    """Change the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flipped, Path.unlink])
def test_weights_unlike_those_of_the_training_are_not_merged(
    trained: StepContext, damage: Callable[[Path], None]
) -> None:
    damage(trained.workspace.base / "model.safetensors")

    with pytest.raises(StepFailure, match="the 4-bit base") as caught:
        published(trained)

    assert caught.value.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert not trained.workspace.merged.exists()
    assert (trained.workspace.adapter / "adapter_model.safetensors").is_file()


def test_without_room_only_the_adapter_is_published(trained: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(trained.workspace.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))

    with pytest.raises(StepFailure, match=r"merged model in 16 bit needs \d\.\d MiB, .* has 0\.1 MiB free") as caught:
        published(trained)

    assert caught.value.exit_code is ExitCode.STORAGE_FULL
    assert (trained.workspace.adapter / "adapter_model.safetensors").is_file()
    assert not list(trained.workspace.root.glob(".*"))


def anonymous_bytes() -> int:
    """Return this process's memory without file contents, which the kernel can drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_while(work: Callable[[], object]) -> int:
    """The most anonymous memory that was seen during the work."""
    seen, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def mergeable(root: Path, model: Path) -> tuple[TrainedJob, WorkspaceLayout]:
    """A job with an untrained, mergeable adapter and four held-out sequences."""
    context = prepared(root, model, {"output": {"merged": {}}}, packed=False)
    record = read_completion(context.workspace.completion("prepare"), PrepareRecord)
    assert record is not None
    base = load_base(context.workspace.base, NF4, "cpu", attention=record.attention or ATTENTION)
    lora = record.resolve(context.spec).lora
    adapter = attach_adapter(
        base, lora, record.target_modules, seed=3, recomputation=Recomputation(0), base_name="tiny", base_revision="1"
    )
    context.workspace.trained.mkdir()
    save_adapter(adapter, context.workspace.trained)
    trained = TrainRecord(
        fingerprint="",
        adapter_path=context.workspace.trained.name,
        adapter_sha256="",
        training_step=1,
        loss=1.0,
        base_sha256=record.base_sha256,
        compared=Comparison(sequences=4, targets=26, loss=1.0),
    )
    packed = record.model_copy(update={"packed": True})
    return TrainedJob("tiny", JOB_UID, record.resolve(context.spec), "tiny", packed, trained), context.workspace


LARGE_LAYER, SHARD = 1024 * 4096, 16 * 2**20
"""Entries of the largest layer of a model of 242 MiB, and bytes of a file of its weights."""
_MMAP_THRESHOLD = -3


def merge_of_a_larger_model(root: Path) -> int:
    """Merge into `root/merged` in a new process; returns the peak bytes of memory."""
    allocator = ctypes.CDLL(None)
    # Pieces of 64 KiB and more go back to the kernel when they are freed. By default glibc keeps those below 32 MiB,
    # and a process that has freed some before serves the merge from them. Source: M_MMAP_THRESHOLD in mallopt(3). A
    # layer's dequantized constants have 256 KiB: kept, they split the heap, in some runs by 11 MiB, in others by none.
    assert allocator.mallopt(_MMAP_THRESHOLD, 2**16) == 1
    shape = {**SHAPE, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    job = mergeable(root / "job", save_model(root / "model", LlamaConfig(**shape)))
    (root / "merged").mkdir()
    gc.collect()
    allocator.malloc_trim(0)
    before = anonymous_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish_merged, "write_model", partial(write_model, shard_bytes=SHARD))
        return peak_while(lambda: merge(*job, root / "merged")) - before


def test_a_merge_holds_one_file_and_one_layer_in_memory(tmp_path: Path) -> None:
    """While it writes the model and while it tries it out."""
    with ProcessPoolExecutor(max_workers=1, mp_context=server()) as process:
        held = process.submit(merge_of_a_larger_model, tmp_path).result()

    folder = tmp_path / "merged"
    # Everything small: headers, names, the allocator's own. Measured: 7 MiB.
    rest = 12 * 2**20
    assert held <= SHARD + BYTES_PER_ENTRY * LARGE_LAYER + rest < 0.3 * bytes_to_write(model_without_weights(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 8
    assert all((folder / file).stat().st_size < SHARD + 2**20 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    names: dict[str, Tensor] = loaded.state_dict()
    assert set(index["weight_map"]) == set(names)


def test_a_merged_model_that_keeps_rows_apart_is_read_once_to_compute_its_loss(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be larger than the memory: each pass reads it from the disk."""
    job, workspace = mergeable(tmp_path / "job", tiny_llama)
    passes: list[int] = []

    def counted(model: Any, batch: Batch) -> Tensor:
        passes.append(batch.target_count)
        return batch_loss(model, batch)

    monkeypatch.setattr(held_out, "batch_loss", counted)
    losses = []
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        prepared_so = job.prepared.model_copy(update={"packed": packed})
        losses.append(merge(dataclasses.replace(job, prepared=prepared_so), workspace, folder).loss)

    assert passes == [26, 5, 7, 3, 11]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_buffers_of_a_family_are_in_the_merged_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_config("gemma4_text"))
    weights = load_file(model / "model.safetensors")
    scalars = {name: torch.full_like(tensor, 0.5) for name, tensor in weights.items() if name.endswith("layer_scalar")}
    save_file(weights | scalars, model / "model.safetensors", metadata={"format": "pt"})
    convert(model, tmp_path / "base", NF4)
    save_file({}, tmp_path / "adapter.safetensors")

    whole = model_without_weights(model)
    (tmp_path / "merged").mkdir()
    base = BaseWeights(tmp_path / "base", whole)
    write_model(whole, MergeSource(base, tmp_path / "adapter.safetensors", resolved_lora()), tmp_path / "merged")

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert [layer.layer_scalar.item() for layer in loaded.model.layers] == [0.5] * len(scalars)


def test_a_merged_model_is_evaluated_with_the_attention_of_its_training(tmp_path: Path) -> None:
    """Attention within rows lacks the term that BLOOM adds to scores by distance."""
    config = tiny_config("bloom")
    config.initializer_range = 0.4
    model = save_model(tmp_path / "model", config)
    job, workspace = mergeable(tmp_path / "job", model)
    one_row = dataclasses.replace(job, prepared=job.prepared.model_copy(update={"packed": False}))
    (tmp_path / "merged").mkdir()

    found = merge(one_row, workspace, tmp_path / "merged").loss

    own = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    held_out_rows = PreparedDataset.open(workspace.root / job.prepared.data_path, "eval")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        summed = sum(
            float(own(input_ids=tokens[None], labels=labels[None]).loss) * int((labels[1:] != IGNORED_LABEL).sum())
            for index in range(4)
            for tokens, labels in rows_of(held_out_rows[index])
        )
    assert job.trained.compared is not None
    assert found == pytest.approx(summed / job.trained.compared.targets, rel=2e-3)


def test_a_merged_model_that_transformers_does_not_load_whole_is_not_published(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, workspace = mergeable(tmp_path / "job", tiny_llama)

    def without_last_norm(model: Any, source: MergeSource, folder: Path) -> int:
        written = write_model(model, source, folder)
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(publish_merged, "write_model", without_last_norm)
    (tmp_path / "merged").mkdir()
    with pytest.raises(StepFailure, match=r"1 missing keys .* model\.norm\.weight: it is not published") as caught:
        merge(job, workspace, tmp_path / "merged")
    assert caught.value.exit_code is ExitCode.INTERNAL_ERROR
