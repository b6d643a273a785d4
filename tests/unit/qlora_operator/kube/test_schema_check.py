"""Missing fields in a CustomResourceDefinition of another release, and the operator's wait for it."""

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.crd import definitions
from qlora_api.served_schema import missing_fields
from qlora_operator.kube.errors import ClusterError, NotFoundError
from qlora_operator.kube.schema_check import SchemaCheck
from tests.support.builders import VirtualLoop

DEFINITIONS = definitions()


def document(change: Callable[[dict[str, Any]], object] = lambda _properties: None) -> dict[str, Any]:
    """Return our definitions' published schemas, with changed QLoRAJob properties."""
    schemas = {kind: published(kind) for kind in DEFINITIONS}
    change(schemas["QLoRAJob"]["properties"])
    listed = {"x-kubernetes-group-version-kind": [{"kind": "QLoRAJobList"}]}
    named = {f"dev.qlora.v1beta1.{kind}": schema for kind, schema in schemas.items()}
    return {"components": {"schemas": {"dev.qlora.v1beta1.QLoRAJobList": listed} | named}}


def published(kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = copy.deepcopy(DEFINITIONS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["x-kubernetes-group-version-kind"] = [{"group": "qlora.dev", "kind": kind, "version": "v1beta1"}]
    return schema


def without(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(properties: dict[str, Any]) -> None:
        schema = {"properties": properties}
        for name in path[:-1]:
            schema = schema[name] if name in schema else schema["properties"][name]
        del schema["properties"][path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda _properties: None, []),
        (lambda properties: properties["status"]["properties"].update(newer={"type": "string"}), []),
        (without("status", "disruptions"), ["status.disruptions"]),
        (without("spec", "training", "maxSteps"), ["spec.training.maxSteps"]),
        (without("status", "conditions", "items", "reason"), ["status.conditions[].reason"]),
        (lambda properties: properties.pop("status"), ["status"]),
        (lambda properties: properties.update(status={"x-kubernetes-preserve-unknown-fields": True}), []),
    ],
    ids=["the same", "newer", "older status", "older spec", "in a list", "no status", "anything"],
)
def test_missing_fields_of_the_clusters_definition_are_found(
    change: Callable[[dict[str, Any]], object], missing: list[str]
) -> None:
    assert missing_fields(document(change)) == missing


def test_a_missing_kind_is_reported_instead_of_its_fields() -> None:
    served = document()
    del served["components"]["schemas"]["dev.qlora.v1beta1.QLoRASweep"]["properties"]["status"]["properties"]["best"]
    assert missing_fields(served) == ["QLoRASweep.status.best"]
    del served["components"]["schemas"]["dev.qlora.v1beta1.QLoRASweep"]
    assert missing_fields(served) == ["QLoRASweep"]


class Schemas:
    """Answers with the first of these, or raises it."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    async def get_schema(self) -> Any:
        if isinstance(self._answers[0], Exception):
            raise self._answers[0]
        return self._answers[0]


def test_it_waits_reports_the_reason_once_and_continues(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = [ClusterError("refused"), NotFoundError("none"), document(without("status", "phase"))]

    lacks: list[bool] = []
    loop = VirtualLoop()
    check = SchemaCheck(Schemas(answers), lacks.append)

    async def scenario() -> None:
        running = asyncio.create_task(check.run())
        for words, said in (("refused", []), ("CustomResourceDefinition", []), ("status.phase", [True])):
            await asyncio.sleep(600)
            assert words in (check.problem or "")
            assert lacks == said, "only a schema that was read can lack fields"
            assert not running.done()
            answers.pop(0)
            answers.append(document())
        await asyncio.sleep(31)
        assert running.done()
        assert check.problem is None
        assert lacks == [True, False]

    loop.run_until_complete(scenario())
    loop.close()
    assert len(caplog.records) == 3


def test_outdated_crd_is_reported_once_and_clears(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    answers: list[Any] = [document()]

    changes: list[bool] = []
    loop = VirtualLoop()
    check = SchemaCheck(Schemas(answers), changes.append)

    async def scenario() -> None:
        await check.run()
        watching = asyncio.create_task(check.watch())
        for answer in (ClusterError("refused"), NotFoundError("none")):
            answers[0] = answer
            await asyncio.sleep(600)
            assert check.problem is None, "an outage says nothing about the fields"
        answers[0] = document(without("status", "phase"))
        await asyncio.sleep(60)
        assert "qlora.dev/v1beta1) lacks status.phase, which" in (check.problem or "")
        await asyncio.sleep(600)
        answers[0] = document()
        await asyncio.sleep(5)
        assert check.problem is None
        answers[0] = document(without("status", "phase"))
        check.suspect()
        await asyncio.sleep(2)
        assert check.problem, "a status that was rejected is a reason to look at once"
        watching.cancel()

    loop.run_until_complete(scenario())
    loop.close()
    assert changes == [False, True, False, True]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "ERROR"]
