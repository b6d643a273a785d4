"""Imports bitsandbytes without PyTorch's compiler, which it needs only where it has no kernels of its own."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, cast


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
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Return a function that compiles `function` at its first call, or a decorator if there is none."""
    if function is None:
        return functools.partial(compile_later, compiler, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return cast("Callable[..., Any]", compiler(function, **options))

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> Any:
        return compiled()(*arguments, **named)

    return call
