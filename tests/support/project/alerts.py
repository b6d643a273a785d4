"""The chart's alerts, and their firing and silent cases."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
FILE = ROOT / "helm" / "qlora-operator" / "files" / "alerts.yaml"
CASES = Path(__file__).with_name("alert_cases.yaml")
"""A test file of promtool, without the name of the file with the rules."""
RUNBOOKS = ROOT / "docs" / "runbooks"


def groups() -> list[dict[str, Any]]:
    """The groups of rules."""
    return list(yaml.safe_load(FILE.read_text())["groups"])


def alerts() -> dict[str, dict[str, Any]]:
    """Each rule, by the name of its alert."""
    found = {rule["alert"]: rule for group in groups() for rule in group["rules"]}
    assert found, FILE
    return found
