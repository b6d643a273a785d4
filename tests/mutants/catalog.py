"""The mutants: each once survived all tests, and names the test that was written to catch it."""

from tests.mutants.mutant import Mutant

_TRAINER = "trainer_image/qlora_trainer"
_OCI_TESTS = "tests/trainer/stores/test_oci.py"
_MEMORY_FIT = f"{_TRAINER}/model/memory_fit.py"
_MEMORY_FIT_TEST = "tests/unit/qlora_trainer/test_memory_fit.py"

TRAINER = (
    Mutant(
        name="train-is-online",
        file=f"{_TRAINER}/core/process.py",
        old='os.environ["HF_HUB_OFFLINE"] = "1"',
        new="pass",
        tests=(
            "tests/trainer/core/test_process.py::test_only_a_step_that_reads_from_the_hub_or_publishes_there_is_online",
            "tests/trainer/core/test_process.py::test_the_library_of_the_hub_sends_nothing_while_training",
        ),
    ),
    Mutant(
        name="oci-blob-is-not-checked",
        file=f"{_TRAINER}/stores/oci.py",
        old="if digest_of(content) != blob.digest:",
        new="if False:",
        tests=(f"{_OCI_TESTS}::test_a_small_blob_with_another_content_than_its_digest_is_rejected",),
    ),
    Mutant(
        name="oci-resume-trusts-that-the-server-knows-ranges",
        file=f"{_TRAINER}/stores/oci.py",
        old="0 if offset and answer.status_code != 206 else offset",
        new="offset",
        tests=(f"{_OCI_TESTS}::test_a_download_resumes_with_the_same_bytes_whether_the_server_knows_ranges_or_not",),
    ),
    *(
        Mutant(
            name=f"memory-estimate-ignores-{name}",
            file=_MEMORY_FIT,
            old=old,
            new="",
            tests=(f"{_MEMORY_FIT_TEST}::test_every_setting_that_decides_the_memory_reaches_the_estimate",),
        )
        for name, old in (
            ("dora", "use_dora=spec.lora.use_dora,"),
            ("whole-modules", "whole_modules=frozenset(spec.lora.modules_to_save or ()),"),
            ("gpus", "gpus=spec.resources.gpus,"),
            ("sharding", "sharding=spec.training.sharding,"),
        )
    ),
)

MUTANTS = TRAINER
