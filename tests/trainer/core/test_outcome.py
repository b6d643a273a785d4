"""Meaning of an error for the job: its exit code, decided without loading a library."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from qlora_api.contract import ExitCode, ResultRecord, decode_record, encode_record
from qlora_api.spec.dataset import MAX_MIX_SOURCES
from qlora_api.status import DatasetStatus, MemoryStatus, MixedSourceStatus
from qlora_trainer.core.failures import Interrupted, bad_dataset, is_out_of_gpu_memory
from qlora_trainer.core.outcome import Ending, Terminated, classify, result_record
from qlora_trainer.core.records import Findings

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        "CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, cuDNN"
    ),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
REPORTERS = (
    *("PyTorch", "cuBLAS", "CUDA", "driver", "NCCL", "cuDNN", "cuDNN's device memory"),
    *("PyTorch about cuDNN", "cuSOLVER", "Triton"),
)
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("CUDA error: out of memory"),
    MemoryError("out of memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=REPORTERS)
def test_gpu_memory_exhausted_by_any_library_is_recognized(error: RuntimeError) -> None:
    """Training halves its micro batch for the errors that end a step with this code."""
    assert is_out_of_gpu_memory(error)
    ending = classify(error)
    assert ending.exit_code is ExitCode.GPU_OUT_OF_MEMORY
    assert "spec.training.microBatchSize" in ending.message
    assert "\n" not in ending.message


@pytest.mark.parametrize("error", SHORTAGES, ids=REPORTERS)
def test_a_shortage_is_found_in_the_chain_of_errors(error: RuntimeError) -> None:
    outer = KeyError("state")
    outer.__context__ = error
    assert classify(outer).exit_code is ExitCode.GPU_OUT_OF_MEMORY


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_another_error_is_no_shortage_of_gpu_memory(error: Exception) -> None:
    assert not is_out_of_gpu_memory(error)
    assert classify(error).exit_code is ExitCode.INTERNAL_ERROR


JUDGED_ALONE = """
import sys
from qlora_trainer.core.outcome import classify
print(*(int(classify(error).exit_code) for error in (RuntimeError("CUDA error: out of memory"), OSError())))
assert not {"torch", "huggingface_hub"} & set(sys.modules)
"""


def test_an_error_is_classified_without_loading_torch_or_the_hubs_client() -> None:
    command, environment = [sys.executable, "-c", JUDGED_ALONE], {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["13", "203"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (bad_dataset("line 3 is no object"), ExitCode.BAD_DATASET),
        (Interrupted(3, 6, 3), ExitCode.INTERRUPTED),
        (Terminated(), ExitCode.INTERRUPTED),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.STORAGE_FULL),
        (OSError(errno.EACCES, "Permission denied"), ExitCode.INTERNAL_ERROR),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ExitCode.UNREACHABLE),
        (TimeoutError("timed out"), ExitCode.UNREACHABLE),
        (KeyError("loss"), ExitCode.INTERNAL_ERROR),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: ExitCode) -> None:
    ending = classify(error)
    assert ending.exit_code is code
    assert ending.is_unexpected == (code is ExitCode.INTERNAL_ERROR)


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert classify(AssertionError()).message.startswith("unexpected AssertionError: no message;")


def test_a_result_that_is_too_long_drops_messages_then_sources_of_a_mix() -> None:
    source = MixedSourceStatus(source="x" * 48, rows=10**12, used_rows=10**12, epoch_rows=10**12, tokens=10**15)
    dataset = DatasetStatus(format="chat", rows=1, used_rows=1, sources=(source,) * MAX_MIX_SOURCES)

    def record(explanation: str) -> ResultRecord:
        memory = MemoryStatus(verdict="unknown", message=explanation)
        found = Findings(dataset=dataset, memory=memory)
        ending = Ending(ExitCode.BAD_DATASET, "what is wrong " * 70)
        names = {"job_uid": "job", "pod_uid": "pod", "time": "2026-01-02T03:04:05Z"}
        return result_record(ending, None, found, step="prepare", attempt=1, **names)

    short, long = record("no GPU"), record("y" * 1024)
    assert short.dataset == dataset
    assert long.dataset == dataset.model_copy(update={"sources": None})
    for found in (short, long):
        assert found.message.startswith("what is wrong what")
        assert decode_record(encode_record(found), job_uid="job", pod_uid="pod") == found
