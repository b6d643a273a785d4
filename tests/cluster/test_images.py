"""The images as they are shipped: only required files, and a user who is not root."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster import product
from devcluster.processes import run
from devcluster.product import Images
from qlora_api.contract import CPU_ALLOCATOR
from release import dockerfiles, project

LARGEST_OPERATOR_IMAGE = 150_000_000
PYTHON = "/opt/qlora/bin/python"
SITE_PACKAGES = "/opt/qlora/lib/python3.11/site-packages"
# Of the driver, which the node brings.
DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}
# Run with the image's Python: the linker's result for each library that Python or cuDNN loads by name, and for their
# dependencies. Others are loaded if a machine has InfiniBand, whose libraries the image never had.
LINKED = """
import glob, os, subprocess, sys
os.chdir(sys.argv[1])
libraries = glob.glob("nvidia/*/lib/*.so*") + glob.glob("torch/lib/*.so")
folders = {os.path.abspath(os.path.dirname(path)) for path in libraries}
loaded = [path for pattern in ("torch/lib/lib[tcs]*.so", "bitsandbytes/*.so", "nvidia/cudnn/lib/*.so*")
          for path in glob.glob(pattern)]
for library in loaded:
    told = subprocess.run(["ldd", library], env={"LD_LIBRARY_PATH": ":".join(folders)}, capture_output=True, text=True)
    for line in told.stdout.splitlines():
        print(os.path.basename(library), "needs", line.strip())
"""
IMPORTED = """
import importlib, pkgutil, qlora_trainer
for module in pkgutil.walk_packages(qlora_trainer.__path__, "qlora_trainer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch, torch.utils.tensorboard, torchvision, mlflow, wandb, pyarrow.parquet
print("all of it")
"""


@pytest.fixture(scope="module")
def images() -> Images:
    return product.built_images()


@contextmanager
def container(image: str) -> Iterator[list[str]]:
    """A container of the image; yields the words before a command that runs in it."""
    name = run(["buildah", "from", image]).strip()
    try:
        yield ["buildah", "run", "--isolation", "chroot", name, "--"]
    finally:
        run(["buildah", "rm", name])


def said(inside: list[str], *command: str) -> tuple[int, str]:
    """Return a command's exit code and output from files, as buildah may end early."""
    name = inside[-2]
    run([*inside, "sh", "-c", '"$@" > /tmp/said 2>&1; echo $? > /tmp/code', "sh", *command])
    root = Path(run(["buildah", "mount", name]).strip())
    try:
        return int((root / "tmp/code").read_text()), (root / "tmp/said").read_text()
    finally:
        run(["buildah", "umount", name])


def test_the_operators_image_is_small(images: Images, tmp_path: Path) -> None:
    run(["buildah", "push", "--quiet", images.operator, f"oci:{tmp_path}:image"])
    compressed = sum(blob.stat().st_size for blob in (tmp_path / "blobs" / "sha256").iterdir())
    assert compressed < LARGEST_OPERATOR_IMAGE


def test_the_operators_image_runs_the_operator_and_has_no_torch(images: Images) -> None:
    with container(images.operator) as inside:
        code, output = said(inside, PYTHON, "-m", "qlora_operator")
        assert code != 0
        assert "no settings file" in output
        code, output = said(inside, PYTHON, "-c", "import torch")
        assert code != 0
        assert "No module named 'torch'" in output


def test_the_trainers_image_can_quantize(images: Images) -> None:
    program = (
        "import bitsandbytes, peft, transformers, torch; print(bitsandbytes.nn.Params4bit.__name__, torch.version.cuda)"
    )
    with container(images.trainer) as inside:
        assert re.search(r"Params4bit \d", said(inside, PYTHON, "-c", program)[1])
        assert "prepare" in said(inside, "/opt/qlora/bin/qlora-trainer", "--help")[1]


def test_the_trainers_image_has_each_library_linked_by_pytorch_and_bitsandbytes(images: Images) -> None:
    """The image keeps the libraries for training on a GPU, which no test here has."""
    with container(images.trainer) as inside:
        code, output = said(inside, PYTHON, "-c", LINKED, SITE_PACKAGES)
    assert code == 0, output
    needed = [line.split() for line in output.splitlines() if " needs " in line]
    assert {words[0] for words in needed} > {"libtorch_cuda.so", "libbitsandbytes_cuda132.so", "libcudnn_graph.so.9"}
    assert {words[2] for words in needed} > {"libcudnn.so.9", "libnccl.so.2", "libcusparse.so.12", "libnvJitLink.so.13"}
    missing = {(words[0], words[2]) for words in needed if words[-2:] == ["not", "found"]}
    assert {(library, name) for library, name in missing if name not in DRIVER} == set()


def test_each_module_of_the_trainer_and_each_tracker_imports_in_its_image(images: Images) -> None:
    with container(images.trainer) as inside:
        code, output = said(inside, PYTHON, "-c", IMPORTED)
    assert (code, output.splitlines()[-1]) == (0, "all of it"), output


def test_the_trainers_image_lacks_the_packages_that_its_dockerfile_removes(images: Images) -> None:
    layers = dockerfiles.layers((project.ROOT / project.DOCKERFILES["qlora-trainer"]).read_text())
    removed = [removal.command for layer in layers for removal in layer.removals]
    patterns = [word for command in removed if command.startswith("rm") for word in command.split()[1:] if "/" in word]
    assert len(patterns) > 10
    listed = f"cd {SITE_PACKAGES} && ls -d triton {' '.join(f'{pattern} nvidia/{pattern}' for pattern in patterns)}"
    with container(images.trainer) as inside:
        found = [line for line in said(inside, "sh", "-c", listed)[1].splitlines() if "No such file" not in line]
    assert found == []


def test_the_trainers_image_has_the_layers_whose_purpose_its_dockerfile_states(images: Images) -> None:
    layers = dockerfiles.layers((project.ROOT / project.DOCKERFILES["qlora-trainer"]).read_text())
    description = json.loads(run(["buildah", "inspect", "--type", "image", images.trainer]))["OCIv1"]
    base = json.loads(run(["buildah", "inspect", "--type", "image", images.operator]))["OCIv1"]["rootfs"]["diff_ids"]
    own = [digest for digest in description["rootfs"]["diff_ids"] if digest != base[0]]
    assert len(own) == sum(len(layer.instructions) for layer in layers)


def test_the_trainers_image_has_the_allocator_that_the_operator_names(images: Images) -> None:
    program = "print(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'malloc' in line}))"
    with container(images.trainer) as inside:
        code, output = said(inside, "env", f"LD_PRELOAD={CPU_ALLOCATOR}", PYTHON, "-c", program)
    assert code == 0
    assert CPU_ALLOCATOR.removesuffix(".4") in output
    assert "cannot be preloaded" not in output


def test_neither_image_runs_as_root_or_can_change_itself(images: Images) -> None:
    program = "import os, sys; print(os.getuid(), os.access(sys.prefix, os.W_OK), sys.dont_write_bytecode)"
    for image in (images.operator, images.trainer):
        with container(image) as inside:
            assert said(inside, PYTHON, "-c", program) == (0, "10001 False True\n")
