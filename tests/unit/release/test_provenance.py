"""Provenance is what SLSA defines: in-toto's own definitions of the messages can read it."""

import json
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict, ParseError
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

from release import provenance
from release.project import Artifact, Source
from release.provenance import LOCAL_BUILDER, Builder

SOURCE = Source("0.1.0", "https://github.com/qlora-operator/qlora-operator", "a" * 40, 1_780_000_000)
IMAGE = Artifact("ghcr.io/qlora-operator/qlora-operator", "0.1.0", "sha256:" + "b" * 64)
BASE = "docker.io/library/python:3.11@sha256:" + "c" * 64
GITHUB = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "qlora-operator/qlora-operator",
    "GITHUB_WORKFLOW_REF": "qlora-operator/qlora-operator/.github/workflows/release.yaml@refs/tags/v0.1.0",
    "GITHUB_RUN_ID": "7",
    "GITHUB_RUN_ATTEMPT": "2",
}
WORKFLOW = f"https://github.com/{GITHUB['GITHUB_WORKFLOW_REF']}"


def stated(builder: Builder) -> dict[str, Any]:
    made = provenance.provenance(IMAGE, SOURCE, "operator/Dockerfile", [provenance.image(BASE)], builder)
    return dict(json.loads(json.dumps(made)))


def test_it_follows_the_definition_of_slsa() -> None:
    message = ParseDict(stated(provenance.builder(GITHUB)), Provenance())
    assert message.run_details.builder.id == WORKFLOW
    assert message.run_details.metadata.invocation_id.endswith("/actions/runs/7/attempts/2")
    for dependency in message.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(dependency).validate()
    with pytest.raises(ParseError):
        ParseDict({**stated(provenance.builder(GITHUB)), "builder": "a field of an older version"}, Provenance())


def test_it_names_the_commit_and_the_base_by_digest() -> None:
    commit, base = stated(provenance.builder({}))["buildDefinition"]["resolvedDependencies"]
    assert commit == {"uri": f"git+{SOURCE.repository}@{SOURCE.revision}", "digest": {"gitCommit": SOURCE.revision}}
    assert base == {"uri": "oci://docker.io/library/python:3.11", "digest": {"sha256": "c" * 64}}


def test_a_build_on_ones_own_machine_claims_no_workflow() -> None:
    assert provenance.builder({"GITHUB_WORKFLOW_REF": "somebody/elses"}) == Builder(LOCAL_BUILDER, "")


def test_the_identity_that_signs_is_the_builder() -> None:
    assert provenance.workflow_identity(GITHUB) == provenance.builder(GITHUB).id == WORKFLOW
