"""The example policy requires existing fields of an adapter's lineage."""

import re
from pathlib import Path
from typing import Any

import yaml

from qlora_api.lineage import LINEAGE_TYPE, Lineage, LineageResult

POLICY = Path(__file__).parents[3] / "examples" / "kyverno" / "require-lineage.yaml"


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
