"""A weight quantized in pieces gets the bytes of bitsandbytes, with less memory."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_4bit, quantize_4bit, quantize_blockwise
from torch import Tensor

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.nf4.quantization import PIECE, dynamic_map, quantize

KINDS = [QuantizationSpec(type=kind, double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)]
# No whole byte, no whole block, no whole block of constants, exactly one piece, and an odd last piece.
SHAPES = [(1, 1), (3, 50), (7, 9), (128, 129), (1, PIECE), (257, 2049), (1023, 513)]


def weights(shape: tuple[int, ...], values: str) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float32) * 0.02
    if values == "zeros":
        weight[: max(1, shape[0] // 2)] = 0
    elif values == "extremes":
        flat = weight.view(-1)
        flat[::101], flat[::103], flat[::107] = 3e38, -1e-38, 1e-45
    return weight


def expected(weight: Tensor, quantization: QuantizationSpec, offset: Tensor | None) -> dict[str, Tensor]:
    """Return bitsandbytes' result for the whole weight, with this offset if given."""
    packed, state = quantize_4bit(
        weight.to(torch.bfloat16),
        blocksize=64,
        compress_statistics=quantization.double_quant and offset is None,
        quant_type=quantization.type,
    )
    if offset is not None:
        state.absmax, state.state2 = quantize_blockwise(state.absmax - offset, blocksize=256)
        state.offset, state.nested = offset, True
    return {"": packed, **{f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


def state_of(tensors: dict[str, Tensor]) -> QuantState:
    return QuantState.from_dict({name[1:]: tensor for name, tensor in tensors.items() if name}, torch.device("cpu"))


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("quantization", KINDS, ids=lambda kind: f"{kind.type}-{kind.double_quant}")
@pytest.mark.parametrize("values", ["normal", "zeros", "extremes"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_is_that_of_bitsandbytes(
    shape: tuple[int, ...], values: str, quantization: QuantizationSpec
) -> None:
    weight = weights(shape, values)

    found = dict(quantize(weight, quantization))

    state = state_of(dict(found))
    require_equal(found, expected(weight, quantization, state.offset))
    assert state.shape == weight.shape
    # bitsandbytes itself can read them.
    assert dequantize_4bit(found[""], state).shape == weight.shape


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("largest", [1.0, 3.0, 2.0**-120])
def test_every_16_bit_number_gets_the_value_that_bitsandbytes_gives_it(kind: str, largest: float) -> None:
    """These include middles between two values, and zero with either sign."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= 1]
    blocks = torch.ones(-(-len(numbers) // 63), 64, dtype=torch.bfloat16)
    blocks[:, 1:] = torch.nn.functional.pad(numbers, (0, blocks.shape[0] * 63 - len(numbers))).view(-1, 63)
    quantization = QuantizationSpec(type=kind, double_quant=False)

    found = quantize(blocks * largest, quantization)

    require_equal(dict(found), expected(blocks * largest, quantization, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_of_any_type_is_rounded_to_bfloat16_first(dtype: torch.dtype) -> None:
    weight = weights((65, 127), "normal").to(dtype)
    found = quantize(weight, KINDS[0])
    require_equal(dict(found), dict(quantize(weight.to(torch.bfloat16), KINDS[0])))


def test_the_mean_of_the_constants_is_exact_and_bitsandbytes_is_near() -> None:
    weight = weights((4096, 1024), "normal")
    constants = quantize_4bit(weight.to(torch.bfloat16), blocksize=64, quant_type="nf4")[1].absmax.tolist()
    exact = torch.tensor(math.fsum(constants) / len(constants)).item()

    found = dict(quantize(weight, QuantizationSpec()))
    wanted = expected(weight, QuantizationSpec(), None)

    offset, theirs = state_of(dict(found)).offset.item(), state_of(dict(wanted)).offset.item()
    assert offset == exact
    assert abs(offset - theirs) <= len(constants) * 2**-24 * exact
    differing = (found[".absmax"] != wanted[".absmax"]).float().mean()
    assert float(differing) < 1e-3
    assert torch.equal(found[""], wanted[""])


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight = weights((2048, 1024), "normal")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dict(quantize(weight, QuantizationSpec()))
        torch.set_num_threads(5)
        require_equal(dict(quantize(weight, QuantizationSpec())), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("quantization", KINDS[:2], ids=lambda kind: str(kind.double_quant))
def test_a_value_that_is_not_finite_is_rejected(value: float, quantization: QuantizationSpec) -> None:
    weight = weights((64, 64), "normal")
    weight[5, 7] = value
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantize(weight, quantization)


DIGEST = """
import hashlib, torch
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.nf4.quantization import dynamic_map
from qlora_trainer.model.nf4.quantization import quantize
weight = torch.frombuffer(bytearray(hashlib.shake_128(b"weights").digest(2**20)), dtype=torch.uint8).view(1024, 1024)
weight = weight.float().sub_(127.5).mul_(2e-4 * torch.arange(1, 1025).unsqueeze(1))
digest = hashlib.sha256()
for kind in ("nf4", "fp4"):
    for name, tensor in sorted(quantize(weight, QuantizationSpec(type=kind)).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""
SHA256 = "ea0893d1c69d97495217a70d246f7791108bcdaac4aae7077b16eecaba3adfbb"


def test_the_bytes_do_not_depend_on_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch computes with all instructions here, and in a new process with the basic ones."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )
    assert done.stdout.split() == ["DEFAULT", SHA256]
    exec(DIGEST, {})
    assert capsys.readouterr().out.split()[1] == SHA256


def test_the_values_of_constants_are_those_of_bitsandbytes() -> None:
    """To the bit where PyTorch fuses multiplication and addition."""
    assert torch.allclose(dynamic_map(), create_dynamic_map(), rtol=0, atol=6e-8)
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT" or torch.equal(dynamic_map(), create_dynamic_map())


def test_8_bit_constants_can_be_requested_first_while_building_a_model_on_meta() -> None:
    dynamic_map.cache_clear()

    with torch.device("meta"):
        found = dynamic_map()

    assert found.device.type == "cpu"


MEMORY = """
import resource, sys, torch
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.nf4.quantization import dynamic_map
from qlora_trainer.model.nf4.quantization import quantize
quantize(torch.ones(1024, 1024, dtype=torch.bfloat16), QuantizationSpec())
weight = torch.ones(8192, 8192, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantized = quantize(weight, QuantizationSpec())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - sum(t.nbytes for t in quantized.values()))
"""


def test_a_large_weight_takes_little_memory_besides_its_bytes(tmp_path: Path) -> None:
    """Quantized whole, it would take 900 MiB. Its constants take 4 MiB in 32 bit."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(found.stdout) < 40 * 2**20
