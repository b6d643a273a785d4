"""The base is stored as specified, only the adapter trains, and PEFT reads its files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_api.contract import ExitCode
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.adapter.attach import adapter_parameters, adapter_tensors, restore_adapter, save_adapter
from qlora_trainer.model.base.load import check_quantization, load_base
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from tests.support.models.adapted import NF4, adapted
from tests.support.models.sequences import CPU, random_sequence


def loss_of(model: Any, seed: int = 1) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return batch_loss(model.get_base_model(), Batch.from_sequences([random_sequence((9, 14, 5), seed)], CPU))


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_inner_layers_are_4_bit_and_everything_else_16_bit_and_frozen(
    tiny_llama: Path, kind: Literal["nf4", "fp4"], double: bool
) -> None:
    model = load_base(tiny_llama, QuantizationSpec(type=kind, double_quant=double), "cpu")

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert {(layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) for layer in layers} == {
        (kind, double)
    }
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert type(model.lm_head) is nn.Linear
    rest = [p for name, p in model.named_parameters() if "norm" in name or "embed" in name or "lm_head" in name]
    assert {parameter.dtype for parameter in rest} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_of_another_type_and_a_layer_left_in_16_bit_are_rejected(tiny_llama: Path) -> None:
    model = load_base(tiny_llama, NF4, "cpu")
    with pytest.raises(StepFailure, match="fp4") as other_type:
        check_quantization(model, QuantizationSpec(type="fp4"))
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    with pytest.raises(StepFailure, match=r"only 88\.5% of the parameters") as too_few:
        check_quantization(model, NF4)

    assert other_type.value.exit_code is too_few.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert "'llama'" in too_few.value.message


def test_a_missing_tensor_and_missing_weights_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(StepFailure, match=r"1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight") as tensor:
        load_base(folder, NF4, "cpu")
    weights.unlink()
    with pytest.raises(StepFailure, match="cannot be loaded") as file:
        load_base(folder, NF4, "cpu")

    assert tensor.value.exit_code is file.value.exit_code is ExitCode.MODEL_UNAVAILABLE


def test_pickled_weights_are_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    with pytest.raises(StepFailure) as caught:
        load_base(folder, NF4, "cpu")

    assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE


@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_adapter_weight_gets_a_gradient_also_after_an_evaluation(tiny_llama: Path, checkpointing: bool) -> None:
    model = adapted(tiny_llama, checkpointing=checkpointing)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    model.eval()
    with torch.no_grad():
        loss_of(model)
    model.train()
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()  # B is 0 at first, so A has no gradient before it has moved
    optimizer.zero_grad()
    loss_of(model).backward()

    parameters = adapter_parameters(model)
    assert len(parameters) == 28
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    trained = {id(parameter) for parameter in parameters.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_recomputed_activations_give_the_same_gradients_also_with_dropout(tiny_llama: Path) -> None:
    gradients = []
    for checkpointing in (True, False):
        model = adapted(tiny_llama, dropout=0.5, checkpointing=checkpointing)
        torch.manual_seed(5)
        loss_of(model).backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})

    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_adapter_is_stored_in_the_type_of_the_spec(tiny_llama: Path) -> None:
    assert {tensor.dtype for tensor in adapter_tensors(adapted(tiny_llama)).values()} == {torch.float32}
    narrow = adapted(tiny_llama, dtype="bfloat16")
    assert {tensor.dtype for tensor in adapter_tensors(narrow).values()} == {torch.bfloat16}
    loss_of(narrow).backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(narrow).values())


def test_a_saved_adapter_of_other_layers_is_not_restored(tiny_llama: Path) -> None:
    other = adapter_tensors(adapted(tiny_llama, target_modules=("q_proj",)))

    with pytest.raises(KeyError, match="other tensors"):
        restore_adapter(adapted(tiny_llama), other)


SAVE = """
import sys
from pathlib import Path
from tests.support.models.adapted import adapted
from qlora_trainer.model.adapter.attach import save_adapter
save_adapter(adapted(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_the_layers_are_written_in_order(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT keeps them in a set, whose order depends on the hash seed of the process."""
    save_adapter(adapted(tiny_llama), tmp_path)
    layers = json.loads((tmp_path / "adapter_config.json").read_bytes())["target_modules"]
    assert len(layers) > 1
    assert layers == sorted(layers)


@pytest.mark.slow
def test_the_files_do_not_depend_on_the_hash_seed(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("0", "another")]
    for folder in folders:
        folder.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", SAVE, tiny_llama, folders[0]], env=environment, check=True, capture_output=True
    )
    # The seed of this process is random.
    save_adapter(adapted(tiny_llama), folders[1])

    written = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert written[0] == written[1]
    assert set(written[0]) == {"adapter_model.safetensors", "adapter_config.json"}
