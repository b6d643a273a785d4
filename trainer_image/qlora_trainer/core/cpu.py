"""Everything that training does differently on a CPU than on a GPU: settings and calls of libraries.

It concerns speed and memory only: other modules ask here and compute the same function either way, up to rounding. A
device is given by its type, as `torch.device` names it, so that this module can be used before PyTorch is imported.

glibc's allocator makes a step of SmolLM2-135M a tenth longer than tcmalloc and takes a third more memory above the
loaded model; none of its settings comes near. Keeping the dequantized weights of one block saves a third of all
dequantization and 2 % of a step, and matmuls in two halves save 3 %.
"""

from collections.abc import Mapping
from ctypes.util import find_library
from typing import Literal, cast, get_args

from qlora_api.contract import CPU_ALLOCATOR, GPU_LOSS_CHUNK_TOKENS

ComputeType = Literal["bfloat16", "float32"]
"""The type that matmuls are computed in."""
ENV_COMPUTE_TYPE = "QLORA_CPU_COMPUTE"
"""Overrides the choice by the processor, of a run that has no checkpoint yet."""
BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")
"""x86 instructions that multiply in bfloat16, as `torch.cpu.get_capabilities` names them."""
REPACKS_4BIT_LAYERS = False
"""Whether bitsandbytes may repack 4-bit weights on CPUs with AVX512-BF16.

It would do so in the first evaluation, for a path that has no gradients, and the weights could not be trained on again.
"""
FLOAT32_GRADIENT_TOKENS = 256
"""Attention's gradients of rows up to this length, with padding, are computed in 32 bit.

There the kernel is up to five times faster in 32 bit than in 16 bit (and, as the scores are not rounded, more exact).
"""
# The attention kernel keeps 4 MB of code for each row length that it has seen, for as long as the process lives. With
# rows padded to a multiple of this it sees few. That costs no time, since the kernel works in blocks of this size.
_ROW_MULTIPLE = 64
# On a CPU each number of tokens in a batch costs a tenth of a second and more until oneDNN has code for its matmuls,
# and memory between blocks that all have other sizes. Padding of long batches, 3 % on average, leaves few numbers.
_PADDED_FROM_TOKENS = 512
_TOKENS_MULTIPLE = 64
# On a GPU the allocator keeps blocks of each size, and cuDNN a graph for each number of tokens. Kernels compute tiles
# of 128 tokens in any case.
_GPU_TOKENS_MULTIPLE = 128
_LOSS_CHUNK_TOKENS = 128


def compute_type(architecture: str, units: Mapping[str, object], environ: Mapping[str, str]) -> ComputeType:
    """Choose the type of matmuls on a CPU, given its `platform.machine()` and `torch.cpu.get_capabilities()`.

    Without instructions for it, PyTorch multiplies in bfloat16 by loops of its own: backward 29 times slower than in
    float32 with AVX2, and 1.2 times with AVX-512. Raises ValueError for another type in the environment.
    """
    asked = environ.get(ENV_COMPUTE_TYPE)
    if asked is not None:
        if asked not in (known := get_args(ComputeType)):
            raise ValueError(f"{ENV_COMPUTE_TYPE} is {asked!r}: must be {' or '.join(known)}, or not set")
        return cast("ComputeType", asked)
    has_units = architecture not in ("x86_64", "AMD64") or any(units.get(unit) for unit in BFLOAT16_UNITS)
    return "bfloat16" if has_units else "float32"


def library_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables to set before importing PyTorch, unless in `environ`."""
    settings = {
        # oneDNN keeps the code of 1024 matmuls, by their exact shapes, which change with every packed sequence: some
        # 40 MB more with each. One pass through a model needs a few dozen of them.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    }
    if "OMP_WAIT_POLICY" not in environ:
        # Threads that wait for work spin for a tenth of a millisecond and then sleep: waking one takes as long as a
        # small operation, a third of a step. By default they spin so long that on a shared node they take the core from
        # the thread that they wait for: two processes of two threads on two cores were then three times slower.
        settings["GOMP_SPINCOUNT"] = "20000"
    return {name: value for name, value in settings.items() if name not in environ}


def preloaded_allocator(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that preload the allocator for training on a CPU, if it is installed."""
    installed = find_library("tcmalloc_minimal") == CPU_ALLOCATOR
    return {"LD_PRELOAD": CPU_ALLOCATOR} if installed and "LD_PRELOAD" not in environ else {}


def copies_mapped_weights(device_type: str, *, sharded: bool) -> bool:
    """Whether to copy 16-bit weights out of the mapped file.

    As long as one is used in place, the whole file stays in memory. A base that will be sharded leaves it anyway.
    """
    return device_type == "cpu" and not sharded


def padding(tokens: int, device_type: str) -> int:
    """Tokens of padding to append to a batch of `tokens` tokens."""
    if device_type == "cpu":
        return -tokens % _TOKENS_MULTIPLE if tokens >= _PADDED_FROM_TOKENS else 0
    return -tokens % _GPU_TOKENS_MULTIPLE


def loss_chunk_tokens(device_type: str) -> int:
    """Tokens whose logits exist at the same time.

    Each chunk reads the whole output layer twice. A GPU computes so fast that with chunks of 128 reading it takes
    longer than multiplying; on a CPU larger chunks only take more memory.
    """
    return _LOSS_CHUNK_TOKENS if device_type == "cpu" else GPU_LOSS_CHUNK_TOKENS


def keeps_dequantized(device_type: str, *, recomputed: bool) -> bool:
    """Whether a fused LoRA layer keeps its dequantized weight until backward.

    Only with `recomputed`: then main memory holds the weights of one block in 16 bit, 1.6 GB at 65B.
    """
    return recomputed and device_type == "cpu"


def matmul_parts(rows: int, columns: int, device_type: str) -> int:
    """In how many parts to multiply `rows` rows by a matrix of `columns` columns, one part after the other.

    Given 1024 rows, oneDNN leaves all but one thread idle for matrices of 513 to 1024 columns, as models have that are
    small enough for a CPU (1.2 instead of 1.9 TFLOP/s on two cores); given half of the rows it does not.
    """
    return 2 if device_type == "cpu" and 512 < columns <= 1024 and 768 <= rows <= 1024 else 1


def stacked_ranks(device_type: str) -> int:
    """The most ranks of several adapters that are multiplied as one, with each token's products for the others dropped.

    A tile of a GPU's matmul has as many columns, so fewer take as long. On a CPU the dropped products take time.
    """
    return 0 if device_type == "cpu" else 256


def multiplies_into_float32(device_type: str) -> bool:
    """Whether a product of 16-bit matrices may be made in 32 bit, without rounding. PyTorch has that for GPUs only."""
    return device_type != "cpu"


def fuses_norms(device_type: str) -> bool:
    """Whether `model.kernels.norms` replaces root mean squares, as on a CPU only."""
    return device_type == "cpu"


def fuses_attention(device_type: str) -> bool:
    """Whether `model.kernels.attention_cpu` computes the attention of all rows."""
    return device_type == "cpu"


def padded_row(tokens: int) -> int:
    """Tokens of a row of `tokens` tokens with the attention kernel's padding."""
    return tokens + -tokens % _ROW_MULTIPLE
