"""Records and exit codes: each side reads the other's records, and rejects anything else."""

import json

import pytest

from qlora_api.artifact_status import MergedStatus
from qlora_api.contract import (
    CONTRACT_VERSION,
    MAX_PROGRESS_BYTES,
    MAX_RESULT_BYTES,
    PERMANENT_EXIT_CODES,
    ExitCode,
    ProgressRecord,
    ResultRecord,
    decode_record,
    encode_record,
    is_signed,
    needed_contract,
    with_signing,
    without_signing,
)
from qlora_api.spec.dataset import MAX_MIX_SOURCES

OURS = {"job_uid": "job-1", "pod_uid": "pod-1"}
TIME = "2026-01-02T03:04:05Z"
PROGRESS = ProgressRecord(**OURS, step="train", time=TIME, training_step=3, total_steps=10, loss=1.25)
RESULT = ResultRecord(
    **OURS, step="train", time=TIME, attempt=2, outcome="failed", exit_code=14, reason="Diverged", message="loss is NaN"
)

MERGED = RESULT.model_copy(
    update={
        "merged": MergedStatus(
            uri="pvc://out/merged", sha256="b" * 64, size_bytes=14, eval_loss=1.625, adapter_eval_loss=1.875
        )
    }
)


@pytest.mark.parametrize("record", [PROGRESS, RESULT, MERGED], ids=["progress", "result", "merged"])
def test_a_record_survives_the_way_through_the_log(record: ProgressRecord | ResultRecord) -> None:
    line = encode_record(record)
    assert "\n" not in line
    assert decode_record(line, **OURS) == record


def test_unknown_fields_of_a_newer_trainer_are_ignored() -> None:
    line = json.dumps(json.loads(encode_record(PROGRESS)) | {"fromTheFuture": 1})
    assert decode_record(line, **OURS) == PROGRESS


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Loading weights: 100%",
        "{",
        "[1, 2]",
        '{"kind":"progress"}',
        encode_record(PROGRESS).replace("job-1", "job-2"),
        encode_record(PROGRESS).replace("pod-1", "pod-2"),
        encode_record(PROGRESS).replace("1.25", "NaN"),
        encode_record(PROGRESS).replace("1.25", "1e999"),
        encode_record(PROGRESS).replace('"trainingStep":3', '"trainingStep":-3'),
        encode_record(RESULT).replace("loss is NaN", "x" * 2000),
        encode_record(RESULT).replace(TIME, "2026-01-02 03:04"),
        encode_record(RESULT).replace('"attempt":2', '"attempt":2,"trainingStep":9007199254740993'),
        encode_record(RESULT).replace('"attempt":2', '"attempt":2,"peakMemoryBytes":9007199254740993'),
        encode_record(MERGED).replace("1.625", "1e999"),
        encode_record(MERGED).replace("1.625", "-Infinity"),
        encode_record(MERGED).replace("1.625", "9" * 400),
        encode_record(MERGED).replace("1.875", "NaN"),
        "{" + " " * MAX_RESULT_BYTES + encode_record(PROGRESS)[1:],
    ],
)
def test_a_line_that_is_no_record_of_this_job_and_pod_is_ignored(line: str) -> None:
    assert decode_record(line, **OURS) is None


def test_numbers_outside_json_cannot_be_reported() -> None:
    with pytest.raises(ValueError, match="finite"):
        ProgressRecord(**OURS, step="train", time=TIME, loss=float("nan"))


@pytest.mark.parametrize(
    ("record", "field", "limit"),
    [(PROGRESS, "activity", MAX_PROGRESS_BYTES), (RESULT, "message", MAX_RESULT_BYTES)],
    ids=["progress", "result"],
)
def test_a_record_has_at_most_the_bytes_of_its_kind(
    record: ProgressRecord | ResultRecord, field: str, limit: int
) -> None:
    empty = len(encode_record(record.model_copy(update={field: ""})))
    largest = record.model_copy(update={field: "x" * (limit - empty)})
    assert len(encode_record(largest)) == limit
    with pytest.raises(ValueError, match=f"a {record.kind} record of {limit + 1} bytes is larger than the {limit} "):
        encode_record(record.model_copy(update={field: "x" * (limit - empty + 1)}))


def test_a_kubelet_keeps_the_largest_result_of_a_message_in_any_script() -> None:
    """A kubelet cuts messages at 4096 bytes, and 1024 characters can take 6144."""
    assert MAX_RESULT_BYTES == 4096
    with pytest.raises(ValueError, match="larger than the 4096 bytes"):
        encode_record(ResultRecord.model_validate(RESULT.dump() | {"message": "é" * 1024}))


def test_a_result_has_room_for_the_largest_mix() -> None:
    """All sources have addresses of the shown length, and ten billion rows each."""
    source = {"source": f"{'x' * 23}…{'y' * 24}", "rows": 10**10, "usedRows": 10**10, "epochRows": 10**10}
    counts = ("rows", "usedRows", "evalRows", "tooLongRows", "longestRowTokens", "duplicateRows", "overlapRows")
    dataset = {
        **dict.fromkeys(counts, 10**11),
        "format": "chat, instruction, prompt-completion, sharegpt, text",
        "tokens": 10**15,
        "sha256": "0" * 64,
        "sources": [source | {"tokens": 10**14}] * MAX_MIX_SOURCES,
    }
    memory = {
        "estimateBytes": 10**12,
        "lowBytes": 10**12,
        "highBytes": 10**12,
        "sharedBytes": 10**12,
        "verdict": "unknown",
    }
    base = {"origin": "downloaded", "sha256": "0" * 64, "bytesFetched": 10**12, "seconds": 10**5}
    work = {"parameters": 10**12, "tokens": 10**15, "flops": 1.23456789012345e27}
    found = {"dataset": dataset, "memory": memory, "base": base, "work": work}
    known = {"modelRevision": "0" * 71, "message": "", **found}
    assert len(encode_record(ResultRecord.model_validate(RESULT.dump() | known))) < MAX_RESULT_BYTES - 400


@pytest.mark.parametrize(
    ("code", "reason", "permanent"),
    [
        (0, "Done", False),
        (10, "BadConfiguration", True),
        (11, "BadDataset", True),
        (12, "ModelUnavailable", True),
        (13, "GPUOutOfMemory", True),
        (14, "Diverged", True),
        (15, "UnsafeArtifact", True),
        (16, "StorageFull", True),
        (17, "DoesNotFit", True),
        (18, "RetriesExhausted", True),
        (19, "UnsupportedContract", True),
        (20, "GateFailed", True),
        (143, "Interrupted", False),
        (200, "Unreachable", False),
        (203, "InternalError", False),
    ],
)
def test_exit_codes_keep_their_meaning(code: int, reason: str, permanent: bool) -> None:
    assert (ExitCode(code).reason, ExitCode(code).permanent) == (reason, permanent)
    assert (code in PERMANENT_EXIT_CODES) == permanent


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("nodes", "grouped"), [(1, False), (2, False), (1, True)])
def test_a_job_needs_a_release_that_has_all_it_uses(nodes: int, grouped: bool, chosen: bool) -> None:
    """A release has all of the versions up to its own."""
    plain = needed_contract(nodes, grouped=grouped, chosen=chosen)
    signed = needed_contract(nodes, grouped=grouped, chosen=chosen, signed=True)
    assert plain < signed <= CONTRACT_VERSION
    assert (plain >= 3, plain >= 6) == (nodes > 1 or grouped or chosen, chosen)
    assert (is_signed(plain), is_signed(signed)) == (False, True)
    assert (with_signing(plain), with_signing(signed)) == (signed, signed)
    assert plain <= without_signing(signed) < signed
    assert not is_signed(without_signing(signed))
    assert without_signing(plain) == plain


@pytest.mark.parametrize("version", range(1, CONTRACT_VERSION + 1))
def test_a_key_that_comes_or_goes_changes_nothing_else_of_a_contract(version: int) -> None:
    chosen = needed_contract(1, chosen=True)
    assert (with_signing(version) >= chosen, without_signing(version) >= chosen) == (version >= chosen,) * 2
