"""The trainer's reports from its pods: the records that the operator reads, as the real trainer writes them."""

from datetime import UTC, datetime

from qlora_api.artifact_status import AdapterStatus
from qlora_api.contract import MIN_SECONDS_BETWEEN_PROGRESS, ProgressRecord, ResultRecord, encode_record
from qlora_api.status import DatasetStatus, MemoryStatus, StepName

_TOTAL_STEPS = 10_000
_TAIL_RECORDS = 3


def result(job_uid: str, pod_uid: str, step: StepName, now: datetime) -> str:
    """The termination message of a step that has succeeded."""
    record = ResultRecord(
        job_uid=job_uid,
        pod_uid=pod_uid,
        step=step,
        time=timestamp(now),
        outcome="succeeded",
        exit_code=0,
        reason="Done",
    )
    if step == "prepare":
        memory = MemoryStatus(estimate_bytes=10 * 2**30, low_bytes=9 * 2**30, high_bytes=11 * 2**30, verdict="unknown")
        dataset = DatasetStatus(format="chat", rows=12_000, used_rows=11_900)
        record = record.model_copy(update={"model_revision": "c0ffee", "memory": memory, "dataset": dataset})
    elif step == "train":
        figures = {"training_step": _TOTAL_STEPS, "total_steps": _TOTAL_STEPS, "loss": 1.25, "eval_loss": 1.5}
        record = record.model_copy(update=figures)
    elif step == "publish":
        adapter = AdapterStatus(
            uri="pvc://claim/adapter",
            sha256="a" * 64,
            size_bytes=150_000_000,
            base_model="hf://org/model",
            base_revision="c0ffee",
            rank=64,
            quantization="nf4",
        )
        record = record.model_copy(update={"adapter": adapter})
    return encode_record(record)


def log(job_uid: str, pod_uid: str, step: StepName, started: datetime, now: datetime) -> str:
    """The end of the log of a step that runs: of train, a record every five seconds with the progress until then."""
    if step != "train":
        return ""
    last = int((now - started).total_seconds() / MIN_SECONDS_BETWEEN_PROGRESS)
    lines = []
    for number in range(max(1, last - _TAIL_RECORDS + 1), last + 1):
        seconds = number * MIN_SECONDS_BETWEEN_PROGRESS
        record = ProgressRecord(
            job_uid=job_uid,
            pod_uid=pod_uid,
            step=step,
            time=timestamp(datetime.fromtimestamp(started.timestamp() + seconds, UTC)),
            training_step=min(number, _TOTAL_STEPS),
            total_steps=_TOTAL_STEPS,
            epoch=2 * number / _TOTAL_STEPS,
            loss=3.0 - number / _TOTAL_STEPS,
            learning_rate=2e-4,
            grad_norm=0.5,
            tokens_per_second=1800.0 + number % 7,
            remaining_seconds=(_TOTAL_STEPS - number) * MIN_SECONDS_BETWEEN_PROGRESS,
            peak_memory_bytes=12 * 2**30,
        )
        lines.append(encode_record(record))
    return "".join(f"{line}\n" for line in lines)


def timestamp(moment: datetime) -> str:
    """RFC 3339, in whole seconds, as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
