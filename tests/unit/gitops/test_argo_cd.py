"""Argo CD's view of a job in every phase, and the changes of its actions.

The Lua runs in a Lua 5.1 with the libraries that Argo CD's has; `tests/api/integrations/test_argo_cd.py` runs Argo
CD's own.
"""

from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime, lua_type

from gitops import generate
from qlora_operator.decisions.sweeps.plan import next_status, table
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, parse_sweep
from tests.support.builders import NOW, UID
from tests.support.cluster.phases import Case, cases, changed_spec
from tests.support.sweeps import SWEEP

SETTINGS = yaml.safe_load(generate.VALUES.read_text())["configs"]["cm"]
HEALTH = SETTINGS["resource.customizations.health.qlora.dev_QLoRAJob"]
ACTIONS = yaml.safe_load(SETTINGS["resource.customizations.actions.qlora.dev_QLoRAJob"])
# Strings have no methods in Argo CD either.
ONLY_ARGO_CDS_LIBRARIES = """
debug.setmetatable("", nil)
local date = os.date
package.loaded.os = {date = function(form) return date(form, 0) end}
os, string, math, io, coroutine, debug, python = nil
"""


def evaluate(script: str, body: dict[str, Any]) -> Any:
    """Result of the script for the object."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    lua.execute(ONLY_ARGO_CDS_LIBRARIES)
    lua.globals().obj = lua.table_from(body, recursive=True)
    return to_python(lua.execute(script))


def to_python(value: Any) -> Any:
    if lua_type(value) != "table":
        return value
    return {key: to_python(entry) for key, entry in value.items()}


def with_tables(value: Any) -> Any:
    """As Lua sees it: a list is a table with numbers from 1."""
    if isinstance(value, list):
        value = dict(enumerate(value, start=1))
    return {key: with_tables(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def test_the_values_are_those_of_the_lua_files() -> None:
    assert generate.VALUES.read_text() == generate.render(), "run `make generate`"
    folder = generate.ARGO_CD
    assert (folder / "health.lua").read_text() == HEALTH
    assert (folder / "actions" / "discovery.lua").read_text() == ACTIONS["discovery.lua"]
    files = {file.stem: file.read_text() for file in (folder / "actions").glob("*.lua") if file.stem != "discovery"}
    assert {entry["name"]: entry["action.lua"] for entry in ACTIONS["definitions"]} == files


def test_a_sweep_has_the_same_health_from_the_same_conditions() -> None:
    assert SETTINGS["resource.customizations.health.qlora.dev_QLoRASweep"] == HEALTH
    sweep = make_sweep()
    jobs = {"rates-00": CellJob("rates-00", "1", "Training", suspend=False, suspended_by_sweep=False)}
    body: dict[str, Any] = {"metadata": {"generation": sweep.generation}}
    unseen = evaluate(HEALTH, body | {"status": {"observedGeneration": -1}})
    assert unseen == {"status": "Progressing", "message": "the operator has not seen it yet"}
    status = next_status(sweep, table(sweep, sweep.cells(), jobs), None, None, NOW)
    running = evaluate(HEALTH, body | {"status": status.dump()})
    assert running == {"status": "Progressing", "message": "0 of 4 cells have ended"}
    ended = {
        cell.name: CellJob(cell.name, "1", "Failed", suspend=False, suspended_by_sweep=False, reason="BadDataset")
        for cell in sweep.cells()
    }
    status = next_status(sweep, table(sweep, sweep.cells(), ended), None, None, NOW)
    failed = evaluate(HEALTH, body | {"status": status.dump()})
    assert failed["status"] == "Degraded"
    assert failed["message"].startswith("AllCellsFailed: none of the 4 cells has succeeded (BadDataset)")


def make_sweep() -> QLoRASweep:
    metadata = {"namespace": "team", "name": "rates", "uid": UID, "generation": 1, "resourceVersion": "7"}
    return parse_sweep({"metadata": metadata, "spec": SWEEP["spec"]})


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_argo_cd_shows_the_health_of_every_phase_with_the_operators_message(case: Case) -> None:
    health = evaluate(HEALTH, case.body)
    assert health["status"] == case.health
    assert health["message"].startswith(case.message)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_only_the_applicable_action_is_offered_and_it_changes_one_field(case: Case) -> None:
    assert list(evaluate(ACTIONS["discovery.lua"], case.body)) == [case.action] * (case.action is not None)
    if case.action is None:
        return
    (script,) = [entry["action.lua"] for entry in ACTIONS["definitions"] if entry["name"] == case.action]
    assert evaluate(script, case.body) == with_tables(case.body | {"spec": changed_spec(case.body, case.action)})


def test_no_action_is_offered_for_a_canceled_job() -> None:
    for case in cases():
        assert evaluate(ACTIONS["discovery.lua"], case.body | {"spec": {"cancel": True}}) == {}


def test_an_object_without_a_status_is_waited_for() -> None:
    body = {key: value for key, value in cases()[0].body.items() if key != "status"}
    assert evaluate(HEALTH, body)["status"] == "Progressing"
    assert list(evaluate(ACTIONS["discovery.lua"], body)) == ["suspend"]
