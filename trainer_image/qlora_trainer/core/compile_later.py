"""Imports bitsandbytes without PyTorch's compiler, which it needs where it has no kernels of its own only."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def load_bitsandbytes() -> None:
    """Import bitsandbytes, before any other module does, and compile late.

    It decorates its fallbacks with `torch.compile`. Already that loads the compiler, which takes a second and 50 MB,
    although CPUs with x86-64 and NVIDIA's GPUs have kernels instead of each. Here a fallback is compiled when it is
    called first.
    """
    if "bitsandbytes" in sys.modules:
        return
    # By its name: importers of this module do not load torch.
    torch: Any = importlib.import_module("torch")
    compiler = torch.compile
    torch.compile = functools.partial(compile_later, compiler)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiler


def compile_later(
    compiler: Callable[..., Callable[Arguments, Result]], function: Callable[Arguments, Result], **options: object
) -> Callable[Arguments, Result]:
    """Return a function that compiles `function` at its first call."""

    @functools.cache
    def compiled() -> Callable[Arguments, Result]:
        return compiler(function, **options)

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        return compiled()(*arguments, **named)

    return call
