"""Parsers of addresses, manifests, settings, records and logs read or reject any input."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.contract import ExitCode, decode_record
from qlora_api.memory.model_shape import ModelShape, UnsupportedModelError
from qlora_cli.manifest import ManifestError, load_manifest
from qlora_operator.settings import SettingsError, load_settings
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.read.hub_splits import TRAINING, choose_data_files, read_dataset_card
from qlora_trainer.stores.model_pack import unpack
from qlora_trainer.stores.registry import Layer
from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.inputs import BOUNDED, inputs


@pytest.mark.parametrize("name", DOCUMENTS)
@BOUNDED
@given(data=st.data())
def test_a_document_is_read_or_rejected_as_documented(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENTS[name].check(data.draw(inputs(DOCUMENTS[name].seeds)), Path(folder))


def rejection(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ManifestError) as rejected:
        load_manifest(path)
    return str(rejected.value)


def test_a_problem_in_a_merged_part_is_reported_at_the_line_of_its_parent(tmp_path: Path) -> None:
    text = "kind: QLoRAJob\nmetadata:\n  name: a\nspec:\n  <<: {unknown: 1}\n"
    assert f"{tmp_path / 'job.yaml'}:4: spec.unknown: unknown field" in rejection(tmp_path / "job.yaml", text)


def test_aliases_that_multiply_do_not_fill_the_memory(tmp_path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "or infinite, with its aliases expanded" in rejection(tmp_path / "job.yaml", "a0: &a0 [x]\n" + levels)


def test_an_object_that_contains_itself_is_rejected(tmp_path: Path) -> None:
    assert "or infinite, with its aliases expanded" in rejection(tmp_path / "job.yaml", "--- &a\nspec: *a\n")


@pytest.mark.parametrize("value", ["!!bool x", "0x" + "f" * 5000, "2001-99-99"])
def test_a_value_that_yaml_cannot_construct_is_rejected(tmp_path: Path, value: str) -> None:
    assert str(tmp_path) in rejection(tmp_path / "job.yaml", f"apiVersion: {value}\n")


def test_a_fields_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    message = rejection(tmp_path / "job.yaml", 'kind: QLoRAJob\n"\\e[31mspec\\n": 1\n')
    assert "\\x1b[31mspec\\n: unknown field" in message
    assert "\x1b" not in message


@pytest.mark.parametrize("value", ["!!bool x", "!!int ''", "[" * 1000, "0x" + "f" * 5000])
def test_settings_that_yaml_cannot_construct_are_rejected(tmp_path: Path, value: str) -> None:
    (tmp_path / "settings.yaml").write_text(f"workers: {value}\n")
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load_settings(tmp_path / "settings.yaml")


def test_an_unpaired_surrogate_in_a_log_is_no_record() -> None:
    assert decode_record('{"activity": "\ud800"}', job_uid="job", pod_uid="pod") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", ["llama"]), ("head_dim", 10**400), ("num_key_value_heads", float("inf"))],
)
def test_a_configuration_of_the_wrong_types_is_rejected_by_field(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        ModelShape.from_config({"model_type": "llama", **dict.fromkeys(_SIZES, 8)} | {field: value})


_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")


@pytest.mark.parametrize(
    "layer",
    [
        {"annotations": ["a"]},
        {"annotations": {"org.cncf.model.filepath": "a"}, "digest": "sha256:../../b", "size": 1},
        {"annotations": {"org.cncf.model.filepath": "a"}, "digest": "sha256:" + "0" * 64, "size": -1},
        {"annotations": {"org.cncf.model.filepath": "a"}, "digest": "sha256:" + "0" * 64, "size": True},
    ],
)
def test_an_invalid_layer_is_rejected(layer: Layer) -> None:
    with pytest.raises(ValueError, match="layer"):
        unpack({"layers": [layer]})


def test_a_pattern_made_to_be_slow_is_matched_quickly() -> None:
    """A regular expression would try 10^11 ways to share the name among the stars."""
    card = {"configs": [{"config_name": "a", "data_files": "*a" * 8 + "b"}]}
    with pytest.raises(StepFailure, match="no data file matches"):
        choose_data_files(["a" * 200 + ".csv"], card, "", TRAINING, "hf://a/b")


@pytest.mark.parametrize("value", ["!!bool x", "!!int ''", "!!timestamp x"])
def test_a_dataset_card_that_yaml_cannot_construct_is_rejected(tmp_path: Path, value: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nconfigs: {value}\n---\n")
    with pytest.raises(StepFailure, match="is not YAML") as failure:
        read_dataset_card(tmp_path / "README.md", "hf://a/b")
    assert failure.value.exit_code is ExitCode.BAD_DATASET
