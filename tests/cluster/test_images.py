"""The images as they are shipped: what each side needs and no more, for a user who is not root."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster import product
from devcluster.processes import run
from devcluster.product import Images
from qlora_api.contract import CPU_ALLOCATOR

LARGEST_OPERATOR_IMAGE = 150_000_000
PYTHON = "/opt/qlora/bin/python"


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
    """Exit code and all output of a command in a container. In a file: buildah may end before it relays a last line."""
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
