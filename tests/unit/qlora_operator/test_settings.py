"""Settings: valid values for an administrator, and messages for mistakes."""

from pathlib import Path

import pytest

from qlora_operator.__main__ import main
from qlora_operator.settings import SettingsError, find_settings, load_settings

GOOD = """
namespaces: [team-a, team-b]
resyncSeconds: 60
logLevel: debug
progress: {enabled: false}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_good_settings_are_read_and_the_rest_has_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert settings.namespaces == ("team-a", "team-b")
    assert (settings.resync_seconds, settings.progress.enabled, settings.workers) == (60, False, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("profiles: {default: {image: x}}", ["profiles", "not permitted"]),
        ("logLevel: loud", ["logLevel", "'debug', 'info'", "'loud'"]),
        ("namespaces: [Team]", ["namespaces.0", "pattern"]),
        ("resyncSeconds: soon", ["resyncSeconds", "number", "'soon'"]),
        ("metricsPort: 0", ["metricsPort", "greater than or equal to 1", "0"]),
        ("namespaces: team", ["namespaces", "tuple", "'team'"]),
        ("namespaces: [", ["not YAML"]),
        ("- a", ["the file", "dictionary"]),
    ],
)
def test_a_mistake_names_the_file_and_the_field(
    tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    assert main(["--settings", str(path)]) == 2
    said = capsys.readouterr().err
    for word in [str(path), *words]:
        assert word in said


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: No such file"):
        load_settings(tmp_path / "nowhere.yaml")


def test_the_command_line_overrides_the_environment() -> None:
    environ = {"QLORA_OPERATOR_SETTINGS": "/from/environment"}
    assert find_settings(Path("/given"), environ) == Path("/given")
    assert find_settings(None, environ) == Path("/from/environment")
    with pytest.raises(SettingsError, match="--settings FILE"):
        find_settings(None, {})


def test_an_election_outside_a_pod_needs_a_namespace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("leaderElection: {enabled: true}\n")
    assert main(["--settings", str(file)]) == 2
    assert "leaderElection.namespace" in capsys.readouterr().err
