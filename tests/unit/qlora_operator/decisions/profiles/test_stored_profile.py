"""Stored profiles: valid ones, invalid ones, and the namespaces that they admit."""

import re
from typing import Any

import pytest

from qlora_api.naming import RESOLVED_ANNOTATION
from qlora_api.status import Resolved
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.parsing import MAX_RESOLVED
from qlora_operator.decisions.profiles.stored_profile import judged, parse_profile, with_selected
from qlora_operator.decisions.resolution import as_copied
from tests.support.builders import NOW, make_job, present, profile_body

LABELS = {"team-a": {"tier": "gold", "zone": "1"}, "team-b": {"tier": "gold"}, "team-c": {"tier": "free"}, "team-d": {}}


@pytest.mark.parametrize(
    ("allowed", "admitted"),
    [
        (None, ["team-a", "team-b", "team-c", "team-d"]),
        ({"names": ["team-d"]}, ["team-d"]),
        ({"selector": {"matchLabels": {"tier": "gold"}}}, ["team-a", "team-b"]),
        ({"selector": {"matchLabels": {"tier": "gold", "zone": "1"}}, "names": ["team-c"]}, ["team-a", "team-c"]),
        ({"selector": {"matchLabels": {"tier": "none"}}}, []),
    ],
)
def test_namespaces_are_admitted_by_their_name_or_their_labels(allowed: Any, admitted: list[str]) -> None:
    stored = parse_profile(profile_body(**({} if allowed is None else {"allowedNamespaces": allowed})))
    profile = with_selected(present(stored.profile), LABELS)
    assert [name for name in LABELS if profile.admits(name)] == admitted


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": None}, "image: Input should be a valid string"),
        ({"gpus": 2}, "gpus: Extra inputs are not permitted"),
        ({"device": "tpu"}, "device: Input should be 'cuda' or 'cpu'"),
        ({"allowedNamespaces": {}}, "allowedNamespaces: Value error, set names, selector, or both"),
    ],
)
def test_a_profile_of_another_schema_is_not_ready_and_names_the_field(changed: dict[str, Any], words: str) -> None:
    stored = parse_profile(profile_body(**changed))
    (found,) = judged(stored, NOW).conditions
    assert (stored.profile, found.status, found.reason) == (None, "False", "InvalidSpec")
    assert words in found.message


def test_a_valid_profile_is_ready_and_its_status_is_written_once() -> None:
    body = profile_body(generation=3)
    status = judged(parse_profile(body), NOW)
    assert (status.observed_generation, [each.status for each in status.conditions]) == (3, ["True"])
    again = parse_profile(body | {"status": status.dump()})
    assert judged(again, NOW) == again.status
    assert parse_profile(body | {"status": {"conditions": 7}}).status.conditions == ()


def test_a_selector_that_cannot_be_evaluated_is_reported() -> None:
    selecting = profile_body(allowedNamespaces={"selector": {"matchLabels": {"tier": "gold"}}})
    for body, reason in ((profile_body(), "Valid"), (selecting, "NamespacesNotReadable")):
        assert [each.reason for each in judged(parse_profile(body), NOW, "forbidden").conditions] == [reason]


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
        "allowedNamespaces": {"names": [f"team-{number}-{'n' * 50}" for number in range(1000)]},
    }


def test_a_profile_too_large_for_a_copy_in_each_job_is_invalid() -> None:
    profile = present(parse_profile(profile_body(**largest_profile("x" * 256))).profile)
    kept = Resolved(
        contract_version=1,
        profile=as_copied(profile),
        claim_name="c" * 253,
        claim_created=False,
        workspace_path="w" * 253,
        queue_name="q" * 253,
        queue_priority_class_name="p" * 253,
    )
    manifest = build_job(make_job(), kept, "prepare", 1)
    assert len(manifest["metadata"]["annotations"][RESOLVED_ANNOTATION]) < MAX_RESOLVED
    larger = parse_profile(profile_body(**largest_profile("\U0001f600" * 256)))
    assert larger.profile is None
    assert re.search(r"spec has \d+ characters as JSON, .* and may have \d+: shorten nccl", larger.problem)
