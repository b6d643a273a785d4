"""Writes the settings and profiles in the chart's values.schema.json from their models; run by `make generate`."""

import json
from pathlib import Path
from typing import Any

from qlora_api.profile import Profile
from qlora_door.settings import DoorSettings
from qlora_operator.settings import Settings

SCHEMA = Path(__file__).parent / "qlora-operator" / "values.schema.json"
# Set by the chart: separate values, and the ports that the Deployment names.
_NOT_IN_SETTINGS = frozenset({"namespaces", "port", "probePort", "metricsPort", "jobNetworkPolicies"})
# The Lease is in the release's namespace, where the operator has the right to write it, and has the release's name.
_NOT_IN_LEADER_ELECTION = frozenset({"namespace", "leaseName"})
# Defaults of the chart for a profile.
_NOT_REQUIRED_OF_PROFILES = frozenset({"image"})


def definitions() -> dict[str, Any]:
    """Return the schema's `$defs`: Settings, Profile and parts, but Kubernetes' own."""
    settings: dict[str, Any] = _plain(Settings.model_json_schema(by_alias=True))
    profile: dict[str, Any] = _plain(Profile.model_json_schema(by_alias=True))
    door: dict[str, Any] = _plain(DoorSettings.model_json_schema(by_alias=True))
    # A door that is switched off has none.
    door["properties"]["models"].pop("minProperties")
    shared = settings.pop("$defs") | profile.pop("$defs") | door.pop("$defs")
    parts = dict(sorted((shared | {"DoorSettings": door, "Profile": profile}).items()))
    return {
        **parts,
        "DoorSettings": _leave_out(door, _NOT_IN_SETTINGS),
        "LeaderElectionSettings": _leave_out(parts["LeaderElectionSettings"], _NOT_IN_LEADER_ELECTION),
        "Settings": _leave_out(settings, _NOT_IN_SETTINGS),
        "Profile": profile | {"required": sorted(set(profile["required"]) - _NOT_REQUIRED_OF_PROFILES)},
    }


def render() -> str:
    """Return the schema file with current definitions, and the rest as in the file."""
    schema = json.loads(SCHEMA.read_text())
    return json.dumps({**schema, "$defs": definitions()}, indent=2, ensure_ascii=False) + "\n"


def _leave_out(schema: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return schema | {"properties": {name: part for name, part in schema["properties"].items() if name not in names}}


def _plain(node: Any, *, names: bool = False) -> Any:
    """Return the node in plain JSON Schema, where `names` marks keys as properties."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _plain(value, names=key in ("properties", "$defs") and not names)
        for key, value in node.items()
        if names or (key != "title" and not key.startswith("x-kubernetes-"))
    }


if __name__ == "__main__":
    SCHEMA.write_text(render())
