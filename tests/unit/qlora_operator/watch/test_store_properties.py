"""Events, answers and lists in any order: the store ends with the true state."""

from random import Random
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.status import StepName
from qlora_operator.decisions.observed.parsing import observe
from qlora_operator.kube.listing import KINDS, ChildKind, ChildList, child_view
from qlora_operator.watch.store import Store
from tests.support.builders import NAME, UID, child, job_body, pod, present, running
from tests.support.cluster.stores import KEY, OTHER, at, rows, show

STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")


class World:
    """Changes in an API server: objects created, changed and deleted, in new versions."""

    def __init__(self, random: Random) -> None:
        self.version = 100
        self.objects: dict[tuple[Any, str], dict[str, Any]] = {}
        self.events: list[tuple[Any, str, dict[str, Any]]] = []
        self._random = random

    def happen(self) -> None:
        kind = self._random.choice(("qlorajobs", "jobs", "pods"))
        uid = {"qlorajobs": UID}.get(kind) or f"{kind}-{self._random.randrange(4)}-{self._random.randrange(3)}"
        self.version += 1
        known = self.objects.get((kind, uid))
        # The job itself stays; a child that is deleted never returns under its UID.
        if known is not None and kind != "qlorajobs" and self._random.random() < 0.3:
            del self.objects[kind, uid]
            self.events.append((kind, "DELETED", at(self.version, known)))
        elif known is not None or all(event[2]["metadata"]["uid"] != uid for event in self.events):
            body = {
                "qlorajobs": lambda: job_body(generation=self._random.randrange(9)),
                "jobs": lambda: child(self._random.choice(STEPS), **self._complete()),
                "pods": lambda: self._random.choice((pod, lambda step: running(pod(step))))("train"),
            }[kind]()
            body = at(self.version, body, uid=uid, name=NAME if kind == "qlorajobs" else uid)
            if kind != "qlorajobs" and self._random.random() < 0.2:
                body["metadata"]["labels"] = {JOB_UID_LABEL: OTHER}
            self.objects[kind, uid] = body
            self.events.append((kind, "MODIFIED" if known else "ADDED", body))

    def _complete(self) -> dict[str, Any]:
        return {"Complete": "x"} if self._random.random() < 0.5 else {}

    def all(self, kind: Any) -> list[dict[str, Any]]:
        return [body for (each, _), body in self.objects.items() if each == kind]

    def labelled(self, kind: Any) -> list[dict[str, Any]]:
        """Those that have the label of the job."""
        return [body for body in self.all(kind) if body["metadata"]["labels"][JOB_UID_LABEL] == UID]

    def children(self, kind: ChildKind) -> ChildList:
        return ChildList([child_view(kind, body) for body in self.labelled(kind)], str(self.version))


def happened(seed: int) -> tuple[Random, World]:
    random = Random(seed)
    world = World(random)
    while len(world.events) < 60 or ("qlorajobs", UID) not in world.objects:
        world.happen()
    return random, world


def check_truth(store: Store, world: World) -> None:
    held = present(store.held(KEY))
    truth = observe(UID, world.labelled("jobs"), world.labelled("pods"))
    assert held.observed == truth
    assert held.body["metadata"] == world.objects["qlorajobs", UID]["metadata"]


@pytest.mark.parametrize("seed", range(100))
def test_events_and_answers_in_any_order_lead_to_the_true_state(seed: int) -> None:
    random, world = happened(seed)
    store = Store()
    shown = world.events + random.sample(world.events, 20)
    random.shuffle(shown)
    for event in shown:
        show(store, *event)
    check_truth(store, world)


@pytest.mark.parametrize("seed", range(100))
def test_after_lost_events_missing_objects_are_read(seed: int) -> None:
    random, world = happened(seed)
    store = Store()
    lost = random.choice((1, 5, 30))
    for event in random.sample(world.events, len(world.events) - lost):
        show(store, *event)
    for kind in KINDS:
        store.compare(kind, None, rows(kind, *world.all(kind)), str(world.version))
    if store.held(KEY) is not None:
        check_truth(store, world)
    store.note_live_read(world.objects["qlorajobs", UID], world.children("jobs"), world.children("pods"))
    check_truth(store, world)
