"""The demo's data set and its scorer, the base of the demo's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.demo.score import is_right, parse, partial_credit

DEMO = Path(__file__).parents[3] / "examples" / "demo"


def rows(name: str) -> list[tuple[str, str]]:
    """Request and command of every row of one of the demo's files."""
    pairs = []
    for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    assert pairs, name
    return pairs


def test_no_request_or_command_comes_twice_or_in_both_sets() -> None:
    both = rows("train.jsonl") + rows("held-out.jsonl")
    assert len({request for request, _ in both}) == len(both)
    assert len({parse(command) for _, command in both}) == len(both)


@pytest.mark.parametrize(
    "answer",
    [
        "kubectl get deployment web -n shop -o yaml",
        "  kubectl get deployment web -n shop -o yaml  \n",
        "kubectl get deployment web -o yaml -n shop",
        "kubectl -n shop get deployment web -o yaml",
        "kubectl get deployment web --namespace shop --output yaml",
        "kubectl get deployment web --namespace=shop --output=yaml",
        "kubectl get deployment web -n=shop -oyaml",
        "kubectl get deploy/web -n shop -o yaml",
        "kubectl get deployments 'web' -n shop -o yaml",
        "`kubectl get deployment web -n shop -o yaml`",
        "You can use `kubectl get deployment web -n shop -o yaml` for that.",
        "Run this:\n```bash\n$ kubectl get deployment web -n shop -o yaml\n```\nIt prints the manifest.",
        "kubectl get deployment web -n shop -o yaml\n\nThis prints the manifest.",
    ],
)
def test_another_spelling_of_the_command_is_right(answer: str) -> None:
    assert is_right(answer, "kubectl get deployment web -n shop -o yaml")
    assert partial_credit(answer, "kubectl get deployment web -n shop -o yaml") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot help with that.",
        "The command is kubectl get deployment web -n shop -o yaml",
        "kubectl",
        "kubectl get deployment 'web -n shop -o yaml",
        "kubectl describe deployment web -n shop -o yaml",
        "kubectl get statefulset web -n shop -o yaml",
        "kubectl get deployment web-2 -n shop -o yaml",
        "kubectl get deployment web -n shop2 -o yaml",
        "kubectl get deployment web -n shop -o json",
        "kubectl get deployment web -n shop",
        "kubectl get deployment web -n shop -o yaml --watch",
        "kubectl get web deployment -n shop -o yaml",
        "kubectl get deployment web -n shop -o",
        "kubectl get pods\nkubectl get deployment web -n shop -o yaml",
    ],
)
def test_any_other_command_is_wrong(answer: str) -> None:
    assert not is_right(answer, "kubectl get deployment web -n shop -o yaml")
    assert partial_credit(answer, "kubectl get deployment web -n shop -o yaml") < 1.0


def test_a_flag_without_a_value_does_not_swallow_the_next_word() -> None:
    assert is_right("kubectl logs --previous web-0 -n shop", "kubectl logs pod/web-0 -n shop -p")
    assert is_right("kubectl drain --ignore-daemonsets=true node-1", "kubectl drain node-1 --ignore-daemonsets")


def test_flags_after_the_double_dash_belong_to_the_command_in_the_pod() -> None:
    assert is_right("kubectl exec -n shop web-0 -- ls -n", "kubectl exec web-0 -n shop -- ls -n")
    assert not is_right("kubectl exec web-0 -- ls -n shop", "kubectl exec web-0 -n shop -- ls")
    assert not is_right("kubectl exec web-0 -n shop -- env", "kubectl exec web-0 -n shop -- ls")


def test_partial_credit_is_the_share_of_common_parts() -> None:
    # get, pod | --namespace=shop or --namespace=dev: two of four parts in common
    assert partial_credit("kubectl get pods -n dev", "kubectl get pods -n shop") == pytest.approx(0.5)
