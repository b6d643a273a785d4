"""This release with the one before it: neither may reject a job that the other has begun.

`tests/support/previous_release` has its CustomResourceDefinitions, and the schema of the document that its trainer
reads: of the first build that serves v1beta1. Earlier ones, which were no releases, served v1alpha1, and nothing
converts their jobs: they must end before the definitions are deleted and this release is installed.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qlora_api.contract import ExitCode
from qlora_api.crd import definitions
from qlora_operator.decisions.manifests.objects import build_job, document
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.runner import require_known_contract
from tests.support.builders import PROFILE, make_job, resolved

PREVIOUS = Path(__file__).parents[2] / "support" / "previous_release"
BECAME_AUTOMATIC = frozenset(
    {
        "lora.rank",
        "lora.alpha",
        "training.microBatchSize",
        "training.gradientAccumulationSteps",
        "training.learningRate",
        "training.scheduler",
        "training.warmupSteps",
        "training.autoMicroBatch",
        "training.maxSequenceLength",
        "training.packing",
        "training.gradientCheckpointing",
    }
)
"""A new job that does not set them gets other values than in the release before."""
NEW_FIELDS: dict[str, Any] = {
    "scheduling": {"queueName": "gpus", "queuePriorityClassName": "high"},
    "retry": {"request": "a", "onNoProgress": "restart"},
    "progressDeadlineSeconds": 600,
    "output": {"base": {"destination": "pvc://out/base"}},
}


def document_for_the_previous_trainer(contract_version: int, **spec: Any) -> Any:
    job = make_job(**spec)
    begun = resolved().model_copy(update={"contract_version": contract_version, "document": document(job, PROFILE)})
    manifest = build_job(job, begun, "train", 1)
    return json.loads(manifest["spec"]["template"]["metadata"]["annotations"]["qlora.dev/spec"])


@pytest.mark.parametrize("contract_version", [1, 2], ids=["begun before the upgrade", "an older image in the profile"])
def test_the_previous_trainer_reads_this_operators_documents(contract_version: int) -> None:
    schema = json.loads((PREVIOUS / "job-document.schema.json").read_text())
    for spec in ({}, NEW_FIELDS):
        jsonschema.validate(document_for_the_previous_trainer(contract_version, **spec), schema)


def added(new: dict[str, Any], old: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Return new fields' schemas by path. Fail if docs/reference/api-stability.md forbids a change."""
    found: dict[str, dict[str, Any]] = {}
    before, after = old.get("properties", {}), new.get("properties", {})
    assert before.keys() <= after.keys(), f"{path} has lost {before.keys() - after.keys()}"
    assert set(new.get("required", ())) <= set(old.get("required", ())), f"{path} requires more than before"
    assert new.get("type") == old.get("type"), f"{path} has another type"
    chosen = path.rpartition("spec.")[2] in BECAME_AUTOMATIC and "default" not in new
    assert chosen or new.get("default") == old.get("default"), f"{path} has another default"
    assert set(new.get("enum", ())) >= set(old.get("enum", ())), f"{path} has lost a value"
    if "items" in old:
        found |= added(new["items"], old["items"], f"{path}[]")
    for name, schema in after.items():
        if name in before:
            found |= added(schema, before[name], f"{path}.{name}")
        else:
            found[f"{path}.{name}"] = schema
    return found


@pytest.mark.parametrize("part", ["spec", "status"])
@pytest.mark.parametrize("kind", definitions())
def test_fields_are_only_added_and_a_new_one_has_no_default(kind: str, part: str) -> None:
    this = definitions()[kind]
    previous = yaml.safe_load((PREVIOUS / f"{this['metadata']['name']}.yaml").read_text())
    new, old = (crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part] for crd in (this, previous))
    assert [path for path, schema in added(new, old, part).items() if "default" in schema] == []


@pytest.mark.parametrize("version", ["1", "2", "3", "4", "5", "6", "7"])
def test_this_trainer_serves_the_previous_and_this_operator(version: str) -> None:
    require_known_contract(version)


def test_a_trainer_that_is_too_old_reports_it() -> None:
    with pytest.raises(StepFailure, match="set the profile's image") as caught:
        require_known_contract("8")
    assert caught.value.exit_code is ExitCode.UNSUPPORTED_CONTRACT
