"""The bitsandbytes wheel runs on CPUs without AVX-512: only functions that it chooses by the CPU's flags have it."""

import platform
from pathlib import Path

import bitsandbytes
import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs, x86
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

_LIBRARY = Path(bitsandbytes.__file__).parent / "libbitsandbytes_cpu.so"
# Multiplications that need AVX512-BF16, and of dequantization the first of two bodies and the code that calls it.
_BY_FLAGS = ("gemv_4bit_inference", "tinygemm_kernel_nn", "dequantizeBlockwise4bitCpu")
_SECOND_BODY = "_omp_fn.1"
_EVEX = 0x62
"""The first byte of the prefix that all instructions of AVX-512 with vectors have."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86")
def test_only_functions_chosen_by_flags_have_avx512() -> None:
    code = _functions()
    found = {name for name, body in code.items() if _has_avx512(body)}
    outside = {name for name in found if not any(each in name for each in _BY_FLAGS) or _SECOND_BODY in name}
    assert not outside, f"{_LIBRARY.name} stops with an illegal instruction on other CPUs: {outside}"
    # The library has both bodies, and the disassembler reads it.
    assert all(any(each in name for name in found) for each in _BY_FLAGS)
    assert any(_SECOND_BODY in name for name in code)


def _functions() -> dict[str, bytes]:
    """The code of each function."""
    with _LIBRARY.open("rb") as file:
        library = ELFFile(file)
        text, symbols = library.get_section_by_name(".text"), library.get_section_by_name(".symtab")
        assert text is not None
        assert isinstance(symbols, SymbolTableSection)
        first, content = text["sh_addr"], text.data()
        return {
            symbol.name: content[symbol["st_value"] - first :][: symbol["st_size"]]
            for symbol in symbols.iter_symbols()
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_size"]
        }


def _has_avx512(body: bytes) -> bool:
    disassembler = Cs(CS_ARCH_X86, CS_MODE_64)
    disassembler.detail = True
    # On past instructions that it has no name for.
    disassembler.skipdata = True
    # Mask registers have another prefix.
    masks = range(x86.X86_REG_K0, x86.X86_REG_K7 + 1)
    return any(
        instruction.bytes[0] == _EVEX
        or (instruction.id and any(register in masks for register in instruction.regs_access()[0]))
        for instruction in disassembler.disasm(body, 0)
    )
