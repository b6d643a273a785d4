"""The chart's alerts: each has a runbook, a severity, and firing and silent cases."""

import re

import yaml

from tests.support.project.alerts import CASES, ROOT, RUNBOOKS, alerts

ALERTS = alerts()


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"index"}
    assert pages == set(ALERTS)
    for page in pages:
        assert (RUNBOOKS / f"{page}.md").read_text().startswith(f"# {page}\n")


def test_the_lists_in_the_documentation_have_each_alert_with_its_severity() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", (RUNBOOKS / "index.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}
    listed = re.findall(r"^\| \[(\w+)\]\(", (ROOT / "docs" / "how-to" / "monitoring.md").read_text(), re.MULTILINE)
    assert listed == list(ALERTS)


def test_each_alert_states_its_cause_and_its_effect() -> None:
    for name, rule in ALERTS.items():
        assert {"summary", "description"} == set(rule["annotations"]), name
        assert all(text.rstrip().endswith(".") for text in rule["annotations"].values()), name
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert rule["for"], name


def test_each_alert_has_a_firing_and_a_silent_case() -> None:
    tried: dict[str, set[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for rule in case["alert_rule_test"]:
            tried.setdefault(rule["alertname"], set()).add(bool(rule["exp_alerts"]))
    assert tried == {name: {True, False} for name in ALERTS}
