"""The last record of a step: the automatic settings in it, and its size."""

import pytest

from qlora_api.automatic import ModelFacts, RowFacts, choose, choose_held_out, choose_length
from qlora_api.contract import MAX_RESULT_BYTES, ExitCode, ResultRecord, decode_record, encode_record
from qlora_api.spec.dataset import MAX_MIX_SOURCES
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import DatasetStatus, MemoryStatus, MixedSourceStatus
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import Ending, result_record, summary
from qlora_trainer.core.records import Findings
from tests.support.manifests import MINIMAL

JOB = QLoRAJobSpec.model_validate(MINIMAL["spec"])
HELD_OUT = choose_held_out(JOB, 10**9)
assert HELD_OUT is not None
CHOICES = (
    choose_length([50] * 999 + [131_072], 131_072),
    HELD_OUT,
    *choose(JOB, 2048, RowFacts(10**8, 10**8, 10**12, held_out=True), ModelFacts(16384, 10**8)),
)


def prepared(sources: int = 0, remarks: tuple[str, ...] = ()) -> PrepareRecord:
    """The record of a job that leaves all settings open, with a mix of so many sources."""
    source = MixedSourceStatus(source="x" * 48, rows=10**10, used_rows=10**10, epoch_rows=10**10, tokens=10**14)
    return PrepareRecord(
        target_modules=("q_proj",),
        packed=True,
        model_type="llama",
        memory=MemoryStatus(estimate_bytes=10**12, low_bytes=10**12, high_bytes=10**12, verdict="unknown"),
        model_path="base",
        model_revision="c" * 40,
        base_path="base",
        base_sha256="b" * 64,
        fingerprint="rows",
        data_path="data/rows",
        dataset=DatasetStatus(
            format="chat", rows=10**10, used_rows=10**10, sha256="a" * 64, sources=(source,) * sources or None
        ),
        settings=CHOICES,
        remarks=remarks,
    )


def reported(completion: PrepareRecord) -> ResultRecord:
    ending = Ending(ExitCode.DONE, summary(completion, "prepare"))
    names = {"job_uid": "job", "pod_uid": "pod", "time": "2026-01-02T03:04:05Z"}
    return result_record(ending, completion, Findings(), step="prepare", attempt=1, **names)


def test_the_message_of_prepare_ends_with_the_chosen_settings_and_their_reasons() -> None:
    record = reported(prepared(remarks=("no packing",)))
    assert len(CHOICES) == 15
    assert "are ready; no packing; automatic: maxSequenceLength 128 (leaves out 1 of 1000 rows, up to" in record.message
    assert record.message.endswith("keep best")
    assert record.settings == CHOICES


def test_the_largest_mix_keeps_the_values_of_all_chosen_settings() -> None:
    record = reported(prepared(MAX_MIX_SOURCES, ("a remark of prepare " * 20,)))
    line = encode_record(record)
    assert len(line) <= MAX_RESULT_BYTES
    assert decode_record(line, job_uid="job", pod_uid="pod") == record
    assert [(each.setting, each.value) for each in record.settings or ()] == [
        (each.setting, each.value) for each in CHOICES
    ]
    assert record.message.startswith("10000000000 rows of format chat")


def test_settings_of_another_spec_are_prepared_again() -> None:
    completion = prepared().model_copy(update={"settings": CHOICES[1:]})
    with pytest.raises(StepFailure, match="run the prepare step again") as caught:
        completion.resolve(JOB)
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert prepared().resolve(JOB).lora.rank == 256
