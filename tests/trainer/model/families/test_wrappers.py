"""Multimodal models, trained on text: the adapter is the whole model's, without towers."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.merge import MergeSource
from qlora_trainer.model.architecture.decoder import place_in_block
from qlora_trainer.model.architecture.dequantized_model import model_without_weights, write_model
from qlora_trainer.model.architecture.text_part import parts_beside_text, random_text_part, without_weights
from qlora_trainer.model.base import layout as base_layout
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.experts.layout import routing_linears
from qlora_trainer.model.experts.stack import expert_stacks
from qlora_trainer.model.families.admission import check_model
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.measure import measure
from qlora_trainer.model.nf4.base_weights import BaseWeights
from tests.support.commands.command import new_files
from tests.support.manifests import job_spec
from tests.support.models.adapted import in_32_bit, loss_and_gradients, restored
from tests.support.models.four_bit import convert, expert_weights, require_quantized_experts, settings
from tests.support.models.plain_loss import mean_loss
from tests.support.models.wrappers import MIXTURES, PACKED, save_wrapper, tiny_wrapper
from tests.support.resolved import resolved_lora, resolved_spec
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run

# One with the decoder of a text model, and one with a special decoder, with positions on three axes.
ALWAYS = frozenset({"mistral3", "qwen2_5_vl"})
SPEC = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}
PROCESSOR = "preprocessor_config.json"
NF4 = QuantizationSpec()


@dataclass(frozen=True)
class Trained:
    """A family's model folder, and the step that trained it without interruption."""

    model: Path
    family: Family
    context: StepContext
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        return self.context.workspace.trained

    @property
    def loader(self) -> Any:
        """The class that users load the base with."""
        return getattr(transformers, self.family.auto_class)

    @cached_property
    def skeleton(self) -> Any:
        """The whole model without weights."""
        return without_weights(AutoConfig.from_pretrained(self.model))

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of its towers and projectors."""
        return parts_beside_text(self.skeleton)

    @property
    def as_plain(self) -> BitsAndBytesConfig:
        """Settings for transformers to have the same layers of text in 4-bit."""
        routing = routing_linears(self.skeleton)
        return settings(llm_int8_skip_modules=["lm_head", *routing] if routing else None)


def families(*names: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in names]


# Experts are in 4-bit here only, in no merged model, and their products depend on all tokens.
dense = pytest.mark.parametrize("trained", families(*PACKED), indirect=True)
routed = pytest.mark.parametrize("trained", families(*MIXTURES), indirect=True)


@pytest.fixture(scope="module", params=families(*PACKED, *MIXTURES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    model = save_wrapper(root / "model", tiny_wrapper(request.param))
    family = inspect_family(model, resolved_lora())
    assert family.mixture_of_experts == (request.param in MIXTURES)
    assert family.mixture_of_experts or not family.one_row
    context = prepared(root / "workspace", model, SPEC, packed=not family.one_row)
    return Trained(model, family, context, run(context))


def test_every_adapted_layer_learns_and_no_layer_of_a_tower_is_adapted(trained: Trained) -> None:
    adapter = load_file(trained.adapter / ADAPTER_FILE)

    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert names == set(trained.family.target_modules)
    assert [name for name in names if name.startswith(trained.beside)] == []
    assert [name for name, tensor in adapter.items() if not bool(tensor.any())] == []
    assert (trained.record.eval_loss or math.inf) < (trained.record.initial_eval_loss or 0)


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    context = prepared(tmp_path, trained.model, SPEC, packed=not trained.family.one_row)
    interrupted_at(context, 3)
    run(context)

    assert adapter_bytes(context) == adapter_bytes(trained.context)
    assert history(context) == history(trained.context)


@dense
def test_another_row_changes_not_a_bit_of_a_rows_loss_and_gradients(trained: Trained) -> None:
    model = restored(trained.context.workspace.base, trained.adapter, trained.family)
    row = torch.arange(100, 114)
    others = [torch.arange(start, start + 11) for start in (10, 300)]
    before, after = (loss_and_gradients(model, other, row) for other in others)

    assert all(map(torch.equal, before, after))


@routed
def test_another_row_changes_experts_by_rounding_only(trained: Trained) -> None:
    model = in_32_bit(restored(trained.context.workspace.base, trained.adapter, trained.family))
    row, other = torch.arange(100, 114), torch.arange(10, 21)

    alone = loss_and_gradients(model, row, dtype=torch.float32)
    if trained.family.one_row:
        loss_and_gradients(model, other, dtype=torch.float32)
        after = loss_and_gradients(model, row, dtype=torch.float32)
    else:
        after = loss_and_gradients(model, other, row, dtype=torch.float32)

    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, alone, strict=True)) < 1e-4


def test_plain_peft_over_the_whole_model_gives_the_loss_that_was_reported(trained: Trained) -> None:
    base = trained.loader.from_pretrained(
        trained.model, quantization_config=trained.as_plain, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    ours = load_base(trained.context.workspace.base, NF4, "cpu", attention=trained.family.attention)
    for name, stack in expert_stacks(ours):
        # bitsandbytes has none of them in 4-bit.
        base.get_parameter(name).data.copy_(stack.dense(0, stack.shape[0], torch.bfloat16))
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            # bitsandbytes' own packing for some CPUs cannot hold layers as narrow as some here.
            layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, trained.adapter).eval()
    adapted_layers = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted_layers == set(trained.family.target_modules)

    # transformers' linear attention multiplies in 16 bit under autocast, the trainer's in 32.
    tolerance = 1e-2 if trained.family.model_type == "qwen3_5" else 2e-3
    assert math.isclose(held_out_loss(trained, model), trained.record.eval_loss or 0.0, rel_tol=tolerance)


def held_out_loss(trained: Trained, model: Any) -> float:
    """The loss of the model's forward pass on the rows of the training's evaluation."""
    return mean_loss(model, PreparedDataset.open(trained.context.workspace.data / "rows", "eval"))


@dense
def test_plain_transformers_reads_the_base_whose_towers_are_as_they_were(trained: Trained) -> None:
    base, report = trained.loader.from_pretrained(trained.context.workspace.base, output_loading_info=True)
    original = dict(trained.loader.from_pretrained(trained.model, dtype=torch.bfloat16).named_parameters())

    assert all(not names for names in report.values())
    in_4_bit = {name for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert in_4_bit >= set(trained.family.target_modules)
    parameters = dict(base.named_parameters())
    of_towers = [name for name in original if name.startswith(trained.beside)]
    assert of_towers or not trained.beside
    assert [name for name in of_towers if not torch.equal(parameters[name], original[name])] == []


@routed
def test_every_expert_is_in_4_bit_and_towers_are_as_they_were(trained: Trained) -> None:
    whole, report = trained.loader.from_pretrained(trained.model, dtype=torch.bfloat16, output_loading_info=True)
    assert all(not names for names in report.values())

    for folder in (trained.context.workspace.base, trained.model):
        require_quantized_experts(load_base(folder, NF4, "cpu"), whole)
    stored = BaseWeights(trained.context.workspace.base, trained.skeleton)
    of_towers = {name: tensor for name, tensor in whole.named_parameters() if name.startswith(trained.beside)}
    assert of_towers
    assert [name for name, tensor in of_towers.items() if not torch.equal(stored[name], tensor)] == []


def test_towers_take_no_memory_in_training_and_are_not_in_the_estimate(trained: Trained) -> None:
    base = load_base(trained.context.workspace.base, NF4, "cpu", attention=trained.family.attention)
    loaded = dict(base.named_parameters())

    assert [name for name in loaded if name.startswith(trained.beside)] == []
    measured = measure(
        trained.model / "config.json",
        resolved_spec(trained.context.spec),
        [StepSize(1, 16, gradient_checkpointing=True)],
        "",
    )
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    packed = {id(layer.weight) for layer in layers}
    in_4_bit = sum(layer.weight.quant_state.shape.numel() for layer in layers)
    assert measured.quantized_parameters == in_4_bit + sum(stack.parameters_count for _, stack in expert_stacks(base))
    assert measured.unquantized_bytes == sum(p.nbytes for p in loaded.values() if id(p) not in packed)


@dense
def test_a_merged_model_is_the_whole_one_with_its_towers_as_they_were(trained: Trained, tmp_path: Path) -> None:
    whole = model_without_weights(trained.model)
    base = BaseWeights(trained.context.workspace.base, whole)
    write_model(
        whole, MergeSource(base, trained.adapter / ADAPTER_FILE, resolved_spec(trained.context.spec).lora), tmp_path
    )

    model, report = trained.loader.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert all(not names for names in report.values())
    original = dict(trained.loader.from_pretrained(trained.model, dtype=torch.bfloat16).named_parameters())
    of_towers = {name: tensor for name, tensor in model.named_parameters() if name.startswith(trained.beside)}
    changed = [name for name, tensor in of_towers.items() if not torch.equal(tensor, original[name])]
    assert changed == []
    assert math.isclose(held_out_loss(trained, model.eval()), trained.record.eval_loss or 0.0, rel_tol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_a_job_is_published_with_the_commands_for_the_whole_model(name: str, tmp_path: Path) -> None:
    model = save_wrapper(tmp_path / "models" / "model", tiny_wrapper(name))
    (model / PROCESSOR).write_text('{"patch_size": 14}')
    spec = {"training": {"maxSteps": 8, "samples": 1}, "output": {"merged": {}}}
    files = new_files(tmp_path / "job", tmp_path / "models", spec)
    for step in ("prepare", "train", "publish"):
        done = files.run(step)
        assert done.exit_code == 0, done.stdout + done.stderr
        assert not re.search("tower|visual", done.stderr)

    assert json.loads((files.workspace / "report" / "samples.json").read_text())["samples"]
    for text in ("adapter/README.md", "report/report.html"):
        assert "AutoModelForImageTextToText.from_pretrained" in (files.workspace / text).read_text()
    assert (files.workspace / "merged" / PROCESSOR).read_text() == (model / PROCESSOR).read_text()
    told = json.loads((files.workspace / "records" / "publish.json").read_text())["merged"]
    assert told["evalLoss"] == pytest.approx(told["adapterEvalLoss"], rel=1e-2)


def test_the_small_model_has_the_constants_of_its_activations() -> None:
    """All else is initialized by transformers. These stay uninitialized memory."""
    model = random_text_part(tiny_wrapper("apertus1p5"), dtype=torch.float32)
    activations = [block.mlp.act_fn for block in model.get_decoder().layers]

    assert activations
    for activation in activations:
        made = type(activation)()
        for name, value in {**made.state_dict(), "beta": made.beta, "eps": made.eps}.items():
            # Rounded to the type that the configuration names.
            assert torch.allclose(getattr(activation, name).float(), value.float(), rtol=2**-7), name


def test_transposed_experts_become_the_same_base_as_saved_ones(tmp_path: Path) -> None:
    published = save_wrapper(tmp_path / "published", tiny_wrapper("qwen3_vl_moe"))
    whole = transformers.AutoModelForImageTextToText.from_pretrained(published, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "saved")
    originals, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "saved"))
    turned = [name for name, tensor in originals.items() if tensor.shape != saved[name].shape]
    assert set(turned) == expert_weights(whole).keys()

    first, second = (convert(tmp_path / name, tmp_path / f"{name}-base", NF4) for name in ("published", "saved"))

    assert first == second
    require_quantized_experts(load_base(tmp_path / "published-base", NF4, "cpu"), whole)


def test_a_base_of_an_earlier_release_whose_tower_is_4_bit_has_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = save_wrapper(tmp_path / "model", tiny_wrapper("gemma3")), NF4
    convert(model, tmp_path / "base", spec)
    with monkeypatch.context() as earlier:
        earlier.setattr(base_layout, "modules_in_16_bit", lambda _model: ())
        convert(model, tmp_path / "earlier", spec)

    found, before = (load_base(tmp_path / name, spec, "cpu") for name in ("base", "earlier"))
    assert bytes_of(found) == bytes_of(before)
    sums = [convert(model, tmp_path / name, spec) for name in ("base", "earlier")]
    assert sums[0] == sums[1], "a new prepare makes it again"


def test_layers_that_only_images_reach_get_no_adapter_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoConfig.for_model("mllama").save_pretrained(tmp_path)
    family = check_model(tmp_path, job_spec(lora=resolved_lora(target_modules=("o_proj", "down_proj"))))

    images_only = {3, 8, 13, 18, 23, 28, 33, 38}
    adapted_blocks = {place_in_block(name)[0] for name in family.target_modules}
    assert adapted_blocks == set(range(40)) - images_only
    assert "no adapter on down_proj of 8 blocks, gate_proj, k_proj, o_proj of 8 blocks" in caplog.text


def bytes_of(model: Any) -> dict[str, bytes]:
    """All weights of a loaded base."""
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}
