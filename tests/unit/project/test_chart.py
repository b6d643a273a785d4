"""The chart's and the Dockerfiles' own files: in step with the models, the version and the wheel."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from helm.values_schema import SCHEMA, render
from qlora_operator.watch.handlers import _configure

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "qlora-operator"
DOCKERFILES = [ROOT / "operator" / "Dockerfile", ROOT / "trainer_image" / "Dockerfile"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_values_schema_describes_the_profile_of_the_models() -> None:
    assert SCHEMA.read_text() == render(), "run `make generate`"


def test_every_default_value_is_in_the_schema_and_explained() -> None:
    text = (CHART / "values.yaml").read_text()
    properties = json.loads(SCHEMA.read_text())["properties"]
    values = yaml.safe_load(text)
    assert set(values) <= set(properties)
    lines = text.splitlines()
    leaves = [number for number, line in enumerate(lines) if re.match(r"^ *\w+: +\S", line)]
    unexplained = [
        lines[number] for number in leaves if not any("# --" in line for line in lines[max(0, number - 4) : number])
    ]
    # Members of an object that is explained as a whole: an identity, and the compute of the pod.
    assert {line.split(":")[0].strip() for line in unexplained} <= {"user", "group", "fsGroup", "cpu", "memory"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_image_is_built_from_the_lock_and_ends_unprivileged(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "uv export" in text
    assert "--frozen" in text
    assert "--require-hashes" in text
    final_stage = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.*)$", final_stage, re.MULTILINE) == ["10001:10001"]
    entrypoint = re.findall(r"^ENTRYPOINT (.*)$", final_stage, re.MULTILINE)
    assert len(entrypoint) == 1
    assert json.loads(entrypoint[0])[0].startswith("/opt/qlora/bin/")


def test_the_build_context_has_only_the_sources_of_the_wheel() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    packages = {*wheel["packages"], *wheel["force-include"]}
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "uv.lock"}
    assert "*" in ignore
    assert sent == packages | files


def test_the_documents_name_the_oldest_kubernetes_that_the_chart_admits() -> None:
    """1.34 streams lists to watches by default. Older API servers reject that."""
    oldest = re.fullmatch(r">=(1\.\d+)\.0-0", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])
    assert oldest is not None
    documents = [ROOT / "README.md", CHART / "README.md", ROOT / "docs" / "how-to" / "install.md"]
    stated = {str(path): set(re.findall(r"Kubernetes (1\.\d+)", path.read_text())) for path in documents}
    assert stated == {str(path): {oldest[1]} for path in documents}
    assert _configure(75).watching.initial_streaming
