"""Validates and imports pre-quantized (bitsandbytes) layers, tensor by tensor."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from bitsandbytes.functional import get_4bit_type
from pydantic import JsonValue
from torch import Tensor

from qlora_api.printable import shortened
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.model.nf4.quantization import BASE_DTYPE, BLOCK, OUTER_BLOCK, dynamic_map

PACKED = ""
_STORAGE_SIZES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Bytes of the types of packed weights (`bnb_4bit_quant_storage`)."""
_MAX_STATE_BYTES = 4096
_FLOATS = ("bfloat16", "float16", "float32")
_TOLERANCE = 1e-6


def split(stored: str) -> tuple[str, str]:
    """Name of a stored tensor's weight, and its role: `PACKED` or a constant."""
    layer, found, constant = stored.rpartition(".weight.")
    return (f"{layer}.weight", constant) if found else (stored, PACKED)


@dataclass(frozen=True)
class StoredTensor:
    """One of the tensors of a 4-bit layer, by what it must be."""

    role: str
    """`PACKED`, or the name of a constant, such as "absmax"."""
    dtype: str
    """In our base."""
    tensor_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the weight."""
    quantization: QuantizationSpec

    def require_header(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless a tensor of this type and shape can be it."""
        if self.role == PACKED:
            size, (count, *_) = _STORAGE_SIZES.get(dtype), self.tensor_shape
            if size is None or len(shape) != 2 or shape[1] != 1 or shape[0] * size != count:
                types = ", ".join(_STORAGE_SIZES)
                raise ValueError(f"it is {dtype} {list(shape)}, and must be {count} bytes as one column of {types}")
        elif self._is_state:
            if dtype != "U8" or len(shape) != 1 or not 0 < shape[0] <= _MAX_STATE_BYTES:
                raise ValueError(f"it is {dtype} {list(shape)}, and must be U8 with at most {_MAX_STATE_BYTES} bytes")
        elif (dtype, shape) != (self.dtype, self.tensor_shape):
            raise ValueError(f"it is {dtype} {list(shape)}, and must be {self.dtype} {list(self.tensor_shape)}")

    def ours(self, tensor: Tensor) -> Tensor:
        """The tensor as our base has it. Raises ValueError if no such layer has it."""
        if self.role == PACKED:
            return tensor.contiguous().view(torch.uint8).reshape(self.tensor_shape)
        if self._is_state:
            return self._state(tensor)
        if self.role == "quant_map":
            _validate_near(tensor, get_4bit_type(self.quantization.type, device="cpu"), self.quantization.type)
        elif self.role == "nested_quant_map":
            _validate_near(tensor, dynamic_map(), "the dynamic 8-bit type")
        elif tensor.is_floating_point() and not (tensor.isfinite() & (tensor >= 0)).all():
            raise ValueError("it has constants that are negative, infinite or not a number")
        return tensor

    @property
    def _is_state(self) -> bool:
        return self.role.startswith("quant_state.")

    def _state(self, tensor: Tensor) -> Tensor:
        """The description, with the type that our layers compute in."""
        found = _parse(bytes(tensor.tolist()))
        wanted: JsonObject = {
            "quant_type": self.quantization.type,
            "blocksize": BLOCK,
            "dtype": found.get("dtype"),
            "shape": list(self.shape),
        }
        if self.quantization.double_quant:
            offset = found.get("nested_offset")
            wanted |= {"nested_blocksize": OUTER_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            if type(offset) is not float or not isfinite(offset):
                raise ValueError("its nested_offset is no finite number")
        # Equal values may have other types: true is not 1, nor is 64.0 64.
        has_same_types = repr(sorted(found.items())) == repr(sorted(wanted.items()))
        if found != wanted or found["dtype"] not in _FLOATS or not has_same_types:
            raise ValueError(
                f"it describes {shortened(repr(found), 200)}, and must describe {wanted} with a dtype of "
                f"{', '.join(_FLOATS)}"
            )
        ours = json.dumps(wanted | {"dtype": str(BASE_DTYPE).removeprefix("torch.")}).encode()
        return torch.frombuffer(bytearray(ours), dtype=torch.uint8)


def _parse(content: bytes) -> JsonObject:
    def reject(constant: str) -> None:
        raise ValueError(f"it has the number {constant}")

    def reject_twice(pairs: Sequence[tuple[str, JsonValue]]) -> JsonObject:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it has a key twice")
        return dict(pairs)

    try:
        found = json.loads(content, parse_constant=reject, object_pairs_hook=reject_twice)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - the content is wrong, not a type of ours
    return found


def _validate_near(tensor: Tensor, table: Tensor, name: str) -> None:
    # Other releases and machines compute the values of a type up to rounding.
    if not torch.allclose(tensor, table, rtol=0, atol=_TOLERANCE):
        raise ValueError(f"its values are not those of {name}")
