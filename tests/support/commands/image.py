"""Runs the trainer of an image, as a pod does, instead of that of this environment."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

IMAGE = "QLORA_TRAINER_IMAGE"
"""The environment variable that names the image for tests/gpu."""
CONTAINER_TOOL = "CONTAINER_TOOL"
"""The one that names a program with docker's options, `docker` if it is not set."""


def as_in_image(command: Sequence[str], environment: Mapping[str, str], folders: Iterable[Path]) -> list[str]:
    """Return the command of a trainer of this environment as it is, or in the image that is named, on all GPUs.

    As in a pod the root is read-only and `/tmp` is writable. The folders are those of this machine, and so is the
    network, where the processes of several nodes meet.
    """
    image = os.environ.get(IMAGE)
    if not image:
        return list(command)
    mounts = (f"{folder}:{folder}" for folder in sorted(set(folders)))
    variables = {"HF_HUB_OFFLINE": "1", **environment}
    return [
        *(os.environ.get(CONTAINER_TOOL, "docker"), "run", "--rm", "--gpus", "all", "--network", "host"),
        *("--read-only", "--tmpfs", "/tmp:exec", "--shm-size", "1g", "--user", f"{os.getuid()}:{os.getgid()}"),
        *(word for mount in mounts for word in ("--volume", mount)),
        *(word for name, value in sorted(variables.items()) for word in ("--env", f"{name}={value}")),
        # Its entry point stands for the interpreter and the module.
        *(image, *command[3:]),
    ]
