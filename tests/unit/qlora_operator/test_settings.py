"""Settings: valid values for an administrator, and messages for mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_api.naming import RESOLVED_ANNOTATION
from qlora_api.status import Resolved
from qlora_operator.__main__ import main
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.parsing import MAX_RESOLVED
from qlora_operator.decisions.resolution import as_copied
from qlora_operator.settings import SettingsError, find_settings, load_settings
from tests.support.builders import make_job

GOOD = """
namespaces: [team-a, team-b]
resyncSeconds: 60
logLevel: debug
progress: {enabled: false}
profiles:
  default:
    image: example.org/qlora-trainer:1
    device: cpu
  big:
    image: example.org/qlora-trainer:1
    gpuResource: nvidia.com/gpu
    tolerations: [{key: pool, operator: Exists}]
    workspace: {topology: node-local, size: 200Gi}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_good_settings_are_read_and_the_rest_has_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert settings.namespaces == ("team-a", "team-b")
    assert (settings.resync_seconds, settings.progress.enabled, settings.workers) == (60, False, 16)
    assert settings.profiles["big"].workspace.topology == "node-local"
    assert settings.profiles["default"].gpu_resource is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["profiles", "required"]),
        ("profiles: {}", ["profiles", "at least 1"]),
        ("profiles: {default: {}}", ["profiles.default.image", "required"]),
        ("profiles: {default: {image: x, gpus: 2}}", ["profiles.default.gpus", "not permitted"]),
        ("profiles: {default: {image: x, device: tpu}}", ["profiles.default.device", "'cuda' or 'cpu'", "'tpu'"]),
        ("profiles: {Default: {image: x}}", ["profiles.Default", "pattern"]),
        ("profiles: {default: {image: x}}\nresyncSeconds: soon", ["resyncSeconds", "number", "'soon'"]),
        ("profiles: {default: {image: x}}\nmetricsPort: 0", ["metricsPort", "greater than or equal to 1", "0"]),
        ("profiles: {default: {image: x}}\nnamespaces: team", ["namespaces", "tuple", "'team'"]),
        ("profiles: [", ["not YAML"]),
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


def largest_profile(value: str) -> dict[str, Any]:
    """The largest copied part of a profile; `value`: of each variable of NCCL."""
    label = f"{'a' * 190}.example/{'b' * 50}"
    return {
        "image": "i" * 512,
        "imagePullSecrets": [f"{number}{'s' * 252}" for number in range(8)],
        "gpuResource": label,
        "nccl": {f"NCCL_{'X' * 56}{number:02}": value for number in range(32)},
        "runtimeClassName": "r" * 253,
        "serviceAccountName": "s" * 253,
        "nodeSelector": {f"{label}{number:02}": "v" * 63 for number in range(16)},
        "tolerations": [{"key": label, "operator": "Equal", "value": "v" * 63, "effect": "NoExecute"}] * 16,
        "workspace": {"storageClassName": "c" * 253},
        "modelCache": {"claimName": "m" * 253},
        "hubEndpoint": f"https://{'h' * 500}",
        "objectStore": {"endpoint": f"https://{'o' * 500}"},
        "googleStorage": {"endpoint": f"https://{'g' * 500}"},
        "azureStorage": {"account": "a" * 24, "endpoint": f"https://{'z' * 500}"},
        "cloudIdentity": {"provider": "google", "serviceAccountName": "i" * 253},
        "caConfigMap": {"name": "c" * 253, "key": "k" * 253},
        "httpsProxy": f"http://{'.'.join(['p' * 60] * 8)}:65535",
        "noProxy": [f"{'.'.join(['n' * 60] * 4)}.d{number:02}" for number in range(32)],
        "proxySecretName": "x" * 253,
        "registries": [f"{'r' * 50}{number:02}.example.org:5000" for number in range(32)],
        "namespaces": [f"team-{number}-{'n' * 50}" for number in range(1000)],
    }


def test_a_profile_too_large_for_a_copy_in_each_job_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"profiles": {"default": largest_profile("x" * 256)}}))
    profile = load_settings(path).profiles["default"]
    kept = Resolved(
        contract_version=1,
        profile=as_copied(profile),
        claim_name="c" * 253,
        claim_created=False,
        workspace_path="w" * 253,
        queue_name="q" * 253,
        queue_priority="p" * 253,
    )
    manifest = build_job(make_job(), kept, "prepare", 1)
    assert len(manifest["metadata"]["annotations"][RESOLVED_ANNOTATION]) < MAX_RESOLVED
    write(tmp_path, json.dumps({"profiles": {"default": largest_profile("\U0001f600" * 256)}}, ensure_ascii=False))
    with pytest.raises(SettingsError, match=r"profiles\.default: .*found \d+ characters.*at most \d+ are allowed"):
        load_settings(path)


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
    file.write_text("profiles: {default: {image: trainer}}\nleaderElection: {enabled: true}\n")
    assert main(["--settings", str(file)]) == 2
    assert "leaderElection.namespace" in capsys.readouterr().err
