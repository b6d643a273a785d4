"""Writes the page about the trainer's image from its Dockerfile; `docs.generate` writes it with the others."""

from pathlib import Path

from qlora_api.gpus import OLDEST_DRIVER
from release import dockerfiles
from release.project import DOCKERFILES, ROOT

_HEAD = """\
<!-- Written by `make generate` from trainer_image/Dockerfile: change that. -->

# The trainer's image

"""
_ORDER = (
    "The image of `prepare`, `train` and `publish` is large because PyTorch and CUDA are. Its layers are ordered by "
    "how seldom they change: a node that has an earlier release pulls only those that changed. They are the same, byte "
    "for byte, whenever the same packages are built, since file times are fixed and bytecode does not depend on them."
)
_SIZE = (
    "Together these are {saved} of {whole} GB, measured on version 0.1.0. What remains is what PyTorch links with or "
    "loads on a GPU: cuBLAS, cuDNN, cuFFT, cuSPARSE, cuSPARSELt, cuSOLVER, NCCL, NVRTC, CUPTI, cuFile and NVSHMEM's "
    "library for the host. The tests of the cluster train in the image as it is, on a CPU."
)
_DRIVERS = """\
| NVIDIA driver of the node | Image |
|---|---|
| {oldest} or later | the trainer's image: CUDA 13 comes with PyTorch |
| older | none: upgrade the driver |

The operator starts no job while all nodes of its profile that have the labels of NVIDIA's GPU Feature Discovery have \
an older driver (`nvidia.com/cuda.driver-version.major`), or GPUs of a compute capability below 8.0: it waits with the \
reason [`GPUNotSupported`](../how-to/troubleshooting.md#gpunotsupported). `kubectl qlora doctor` reports both per \
profile. A pod of `train` that reaches such a node all the same fails with `BadConfiguration`, after `prepare` has \
downloaded and quantized.

There is no image with CUDA 12, because PyTorch 2.15 has none: its builds for CUDA 12.8 ended with \
[2.12](https://github.com/pytorch/pytorch/issues/178665), those for 12.6 with \
[2.15](https://github.com/pytorch/pytorch/issues/190385). Its other build, for CUDA 13.0, needs the same driver. An \
older PyTorch would be another set of packages, which no test runs."""
# GB (10⁹ bytes), unpacked: the image with them, and they themselves.
_WHOLE, _SAVED = "6.8", "1.6"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """The page: its file, and its text in Markdown."""
    dockerfile = (root / DOCKERFILES["qlora-trainer"]).read_text()
    layers = dockerfiles.layers(dockerfile)
    removals = [removal for layer in layers for removal in layer.removals]
    parts = [
        _HEAD + _ORDER,
        "## Drivers",
        _DRIVERS.format(oldest=OLDEST_DRIVER),
        "## Layers",
        f"On top of the base, `{dockerfiles.base_image(dockerfile)}`:",
        "\n".join(f"{number}. {layer.purpose}" for number, layer in enumerate(layers, 1)),
        "## Left out",
        dockerfiles.left_out_packages(dockerfile),
        "Of the packages that are installed, these files are removed:",
        "\n".join(f"- `{removal.command}`: {removal.reason}" for removal in removals),
        _SIZE.format(saved=_SAVED, whole=_WHOLE),
    ]
    return {root / "docs" / "trainer" / "image.md": "\n\n".join(parts) + "\n"}
