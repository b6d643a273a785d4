"""Unsupported GPUs are rejected by name, and NCCL between supported ones has a time limit."""

import json
import os
import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devcluster.addresses import free_port
from qlora_api.contract import ExitCode
from qlora_api.memory.estimate import GIB
from qlora_api.status import MemoryStatus
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.training.distributed import device as device_module
from qlora_trainer.training.distributed import meeting, ranks
from qlora_trainer.training.distributed import nccl as nccl_module
from qlora_trainer.training.distributed.device import require_memory, use_device
from qlora_trainer.training.distributed.launch import ChildRanks, RankInfo
from qlora_trainer.training.distributed.meeting import join_ranks
from tests.support.failures import failing


class Cards:
    """The GPUs that PyTorch and bitsandbytes see, since there is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.chosen: list[int] = []

    def see(self, *cards: tuple[str, tuple[int, int]], bitsandbytes: bool = True) -> None:
        for name, function in {
            "is_available": lambda: bool(cards),
            "device_count": lambda: len(cards),
            "get_device_name": lambda number: cards[number][0],
            "get_device_capability": lambda number: cards[number][1],
            "set_device": self.chosen.append,
        }.items():
            self._monkeypatch.setattr(torch.cuda, name, function)
        library = SimpleNamespace(compiled_with_cuda=bitsandbytes)
        self._monkeypatch.setattr(device_module, "bitsandbytes_library", library)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


T4, V100 = ("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))
A10, H100 = ("NVIDIA A10", (8, 6)), ("NVIDIA H100", (9, 0))


def rejection(local_rank: int = 0) -> str:
    with failing(ExitCode.BAD_CONFIGURATION) as caught:
        use_device("cuda", torch.get_num_threads(), local_rank)
    return caught.value.message


@pytest.mark.parametrize("card", [A10, H100, ("A100", (8, 0))], ids=lambda card: card[0])
def test_a_gpu_with_bfloat16_is_taken_and_adds_in_float32(card: tuple[str, tuple[int, int]], cards: Cards) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    cards.see(T4, card)
    assert use_device("cuda", torch.get_num_threads(), 1) == torch.device("cuda")
    assert cards.chosen == [1]
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False


@pytest.mark.parametrize("card", [T4, V100], ids=lambda card: card[0])
def test_an_older_gpu_is_rejected_by_name_with_supported_ones_and_a_remedy(
    card: tuple[str, tuple[int, int]], cards: Cards
) -> None:
    cards.see(H100, card)
    message = rejection(local_rank=1)
    major, minor = card[1]
    assert f"the GPU {card[0]} has compute capability {major}.{minor}" in message
    assert "8.0 or later, as an A100" in message
    assert "spec.scheduling.profileName" in message
    assert cards.chosen == []


def test_a_gpu_without_kernels_of_bitsandbytes_is_rejected(cards: Cards) -> None:
    cards.see(H100, bitsandbytes=False)
    assert "bitsandbytes has no kernels for the GPU NVIDIA H100" in rejection()


def test_a_gpu_that_is_too_small_is_rejected_unless_the_run_can_shrink(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryStatus(estimate_bytes=round(24.6 * GIB), low_bytes=round(23.7 * GIB), verdict="unknown")
    found = "training needs about 24.6 GiB of GPU memory (at least 23.7), and this GPU has 22.0"
    with failing(ExitCode.DOES_NOT_FIT) as caught:
        require_memory(memory, 22 * GIB, can_shrink=False)
    assert caught.value.message.startswith(f"{found}: set spec.resources.gpuMemory to")
    require_memory(memory, 22 * GIB, can_shrink=True)
    require_memory(memory, 24 * GIB, can_shrink=False)
    assert [line.split(", and")[1] for line in caplog.messages] == [
        " this GPU has 22.0: it may run out of memory",
        " this GPU has 24.0: it may run out of memory",
    ]
    require_memory(memory, 25 * GIB, can_shrink=False)
    require_memory(MemoryStatus(verdict="unknown"), GIB, can_shrink=False)
    assert len(caplog.messages) == 2


def test_a_process_without_a_gpu_is_rejected(cards: Cards) -> None:
    cards.see()
    assert "no CUDA GPU is visible" in rejection()
    cards.see(A10)
    assert "sees 1 GPUs, and process 2 has none" in rejection(local_rank=1)


def test_processes_check_their_gpus_before_nccl_starts(cards: Cards) -> None:
    """NCCL's error would be an internal one, and retried."""
    cards.see(T4)
    with pytest.raises(StepFailure, match="Tesla T4"):
        meeting._connect_all(torch.distributed.HashStore(), RankInfo(size=2, local_size=2), "cuda")
    assert not torch.distributed.is_initialized()


class Nccl:
    """Communicates over NCCL, whose watchdog calls hooks before it aborts the process."""

    supports_abort_hooks = True

    def __init__(self) -> None:
        self.hooks: dict[int, Callable[[], None]] = {}
        self.started = SimpleNamespace(settings={}, timeouts=[])

    def register_abort_hook(self, number: int, hook: Callable[[], None]) -> None:
        self.hooks[number] = hook

    def unregister_abort_hook(self, number: int) -> None:
        del self.hooks[number]

    def _get_backend(self, device: torch.device) -> "Nccl":
        assert device.type == "cuda"
        return self


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def nccl(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> Nccl:
    """NCCL between two processes: this one, and one that has joined and sends nothing."""
    cards.see(A10)
    found = Nccl()
    started = found.started

    def start(backend: str, **settings: Any) -> None:
        started.settings.update(settings, backend=backend)
        started.timeouts.append(settings["timeout"])

    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    monkeypatch.setattr(torch.distributed, "set_timeout", started.timeouts.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=found))
    monkeypatch.setattr(meeting, "_wait_for_all", lambda *_: None)
    monkeypatch.setattr(meeting, "_LOOKS", 1)
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    return found


def ending(code: int) -> None:
    raise Ended(code)


@pytest.mark.parametrize(
    ("local_size", "code"), [(2, ExitCode.UNREACHABLE), (1, ExitCode.PEER_LOST)], ids=["one pod", "several nodes"]
)
def test_an_aborted_nccl_exchange_ends_the_process_with_a_retryable_code(
    local_size: int, code: ExitCode, nccl: Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", ending)
    rank_info = RankInfo(size=2, local_size=local_size, address="127.0.0.1", port=free_port())
    with join_ranks(ChildRanks(rank_info), "cuda", "none"):
        (hook,) = nccl.hooks.values()
        with pytest.raises(Ended) as ended:
            hook()
    assert ended.value.args == (code,)
    assert not code.permanent
    # A finished run ends as it does, whatever NCCL reports at its shutdown.
    assert nccl.hooks == {}


def test_nccls_watchdog_has_a_time_limit_and_each_process_a_gpu_of_its_node(nccl: Nccl) -> None:
    rank_info = RankInfo(size=2, local_size=1, address="127.0.0.1", port=free_port())
    with join_ranks(ChildRanks(rank_info), "cuda", "none"):
        assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
    assert nccl.started.timeouts == [meeting.TO_CONNECT, ranks.TIMEOUT]
    assert nccl.started.settings["device_id"] == torch.device("cuda", 0)
    assert nccl.started.settings["backend"] == "cpu:gloo,cuda:nccl"


def fail_elsewhere(port: int, message: str) -> None:
    """Rank 1 reports that it has failed."""
    client = torch.distributed.TCPStore("127.0.0.1", port, 2, False, wait_for_workers=False)
    failure = {"rank": 1, "code": int(ExitCode.GPU_OUT_OF_MEMORY), "message": message}
    torch.distributed.PrefixStore("attempt-0", client).set(meeting._FAILURE, json.dumps(failure))


def test_a_process_waiting_in_nccl_ends_with_the_exit_code_of_the_failed_one(
    nccl: Nccl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endings: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", endings.put)
    monkeypatch.setattr(nccl_module, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(nccl_module, "SECONDS_TO_NOTICE", 0.01)
    rank_info = RankInfo(size=2, local_size=2, address="127.0.0.1", port=free_port())
    with join_ranks(ChildRanks(rank_info), "cuda", "full"):
        fail_elsewhere(rank_info.port, "the GPU is out of memory")

        assert endings.get(timeout=60) == ExitCode.GPU_OUT_OF_MEMORY
    assert "rank 1: the GPU is out of memory" in caplog.text


def test_a_process_that_detects_the_failure_itself_is_not_ended(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    endings: list[int] = []
    monkeypatch.setattr(os, "_exit", endings.append)
    monkeypatch.setattr(nccl_module, "SECONDS_BETWEEN_LOOKS", 0.01)
    rank_info = RankInfo(size=2, local_size=2, address="127.0.0.1", port=free_port())

    def fail() -> None:
        with join_ranks(ChildRanks(rank_info), "cuda", "full") as found:
            fail_elsewhere(rank_info.port, "the GPU is out of memory")
            assert found.lost is not None
            raise found.lost(RuntimeError("Connection closed"))

    with pytest.raises(StepFailure, match="rank 1: the GPU is out of memory"):
        fail()
    for watch in (thread for thread in threading.enumerate() if thread.name == nccl_module.WATCH):
        watch.join()
    assert endings == []
