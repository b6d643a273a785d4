"""Parsers of addresses, manifests, settings, records and logs read or reject any input."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.contract import decode_record
from qlora_api.memory.model_shape import ModelShape, UnsupportedModelError
from qlora_cli.manifest import ManifestError, load_manifest
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.read.hub_splits import TRAINING, choose_data_files
from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.inputs import BOUNDED, inputs
from tests.support.rejected.parsed import Parsed, parsed


@pytest.mark.parametrize("name", DOCUMENTS)
@BOUNDED
@given(data=st.data())
def test_a_document_is_read_or_rejected_as_documented(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENTS[name].check(data.draw(inputs(DOCUMENTS[name].seeds)), Path(folder))


@pytest.mark.parametrize("case", parsed("documents"), ids=str)
def test_a_wrong_document_is_rejected_in_words(case: Parsed) -> None:
    case.require_rejection(DOCUMENTS)


def test_aliases_that_multiply_do_not_fill_the_memory(tmp_path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (tmp_path / "job.yaml").write_text("a0: &a0 [x]\n" + levels)
    with pytest.raises(ManifestError, match="or infinite, with its aliases expanded"):
        load_manifest(tmp_path / "job.yaml")


def test_a_model_type_that_is_no_text_is_not_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type"):
        ModelShape.from_config({"model_type": ["llama"]})


def test_an_unpaired_surrogate_in_a_log_is_no_record() -> None:
    assert decode_record('{"activity": "\ud800"}', job_uid="job", pod_uid="pod") is None


def test_a_pattern_made_to_be_slow_is_matched_quickly() -> None:
    """A regular expression would try 10^11 ways to share the name among the stars."""
    card = {"configs": [{"config_name": "a", "data_files": "*a" * 8 + "b"}]}
    with pytest.raises(StepFailure, match="no data file matches"):
        choose_data_files(["a" * 200 + ".csv"], card, "", TRAINING, "hf://a/b")
