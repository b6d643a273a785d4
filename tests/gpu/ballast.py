"""Makes a GPU smaller for the time of a test: held memory is missing to all other users of the GPU."""

import gc

import torch

GIB = 2**30


class Ballast:
    """Holds the first GPU's free memory in excess of `free` bytes, if any."""

    def __init__(self, free: int) -> None:
        self._free = free

    def __enter__(self) -> "Ballast":
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        self._held = torch.empty(max(0, free - self._free), dtype=torch.uint8, device="cuda")
        return self

    @property
    def bytes(self) -> int:
        """The memory that it holds, which PyTorch counts as this process's."""
        return int(self._held.nbytes)

    def __exit__(self, *_: object) -> None:
        del self._held
        torch.cuda.empty_cache()
