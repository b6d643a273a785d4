"""The demo's data set and its scorer: what the demo's numbers stand on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.demo.score import Score, is_right, parse, partial_credit, score

DEMO = Path(__file__).parents[3] / "examples" / "demo"


def rows(name: str) -> list[tuple[str, str]]:
    """Request and command of every row of one of the demo's files."""
    pairs = []
    for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


def test_the_sets_have_the_size_that_the_demo_promises() -> None:
    assert 400 <= len(rows("train.jsonl")) <= 600
    assert 40 <= len(rows("held-out.jsonl")) <= 50


def test_no_request_or_command_comes_twice_or_in_both_sets() -> None:
    both = rows("train.jsonl") + rows("held-out.jsonl")
    assert len({request for request, _ in both}) == len(both)
    assert len({parse(command) for _, command in both}) == len(both)


def test_every_held_out_row_has_a_namespace_workload_or_node_that_training_never_saw() -> None:
    seen = {word for request, command in rows("train.jsonl") for word in words(request) | words(command)}
    for request, command in rows("held-out.jsonl"):
        assert words(command) - seen, request


def words(text: str) -> set[str]:
    """Words of a request or command, without the punctuation around them."""
    return set(re.split(r"[\s.,;:/=?()]+", text))


def test_every_operation_of_the_held_out_set_is_taught() -> None:
    def operation(command: str) -> tuple[str, ...]:
        verb, *rest = command.removeprefix("kubectl ").partition(" -- ")[0].split()
        return verb, *sorted(word.split("=")[0] for word in rest if word.startswith("-"))

    taught = {operation(command) for _, command in rows("train.jsonl")}
    assert {operation(command) for _, command in rows("held-out.jsonl")} == taught
    assert len(taught) >= 15


def test_every_command_scores_as_its_own_answer() -> None:
    commands = [command for _, command in rows("train.jsonl") + rows("held-out.jsonl")]
    assert score(commands, commands) == Score(exact=len(commands), total=len(commands), partial=1.0)


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


def test_the_score_counts_exact_answers() -> None:
    measured = score(["kubectl cordon node-1", "no idea"], ["kubectl cordon node-1", "kubectl cordon node-2"])
    assert measured == Score(exact=1, total=2, partial=0.5)
    assert measured.share == 0.5


def test_answers_and_commands_must_pair_up() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        score(["kubectl cordon node-1"], ["kubectl cordon node-1", "kubectl cordon node-2"])
