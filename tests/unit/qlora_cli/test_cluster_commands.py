"""`qlora` with a cluster: jobs are listed and changed, and each error is one sentence."""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from qlora_api.contract import ExitCode
from qlora_cli.__main__ import main
from tests.support.manifests import MINIMAL
from tests.support.services.api_proxy import ApiProxy, Reply, serve_api
from tests.support.services.played_jobs import PlayedJobs

FAILURE = {"step": "train", "reason": "Diverged", "exitCode": 14, "time": "2026-01-02T03:04:05Z"}


class Team:
    """A user of a played API server, with a kubeconfig."""

    def __init__(self, api: ApiProxy, folder: Path) -> None:
        self.api, self.jobs = api, PlayedJobs("people")
        api.weather = self.jobs
        context = {"cluster": "here", "user": "here"}
        self.document: dict[str, Any] = {
            "current-context": "here",
            "contexts": [{"name": "here", "context": context | {"namespace": "people"}}],
            "clusters": [{"name": "here", "cluster": {"server": api.url}}],
            "users": [{"name": "here", "user": {}}],
        }
        self.kubeconfig = folder / "config"
        self.save()

    def save(self) -> None:
        self.kubeconfig.write_text(yaml.safe_dump(self.document))

    def run(self, *arguments: str, answer: str | None = None) -> Result:
        """Run a command, which never ends with a traceback."""
        result = CliRunner().invoke(main, [*arguments, "--kubeconfig", str(self.kubeconfig)], input=answer)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    def done(self, *arguments: str) -> str:
        """The output of a command that succeeds."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    def denied(self, *arguments: str) -> str:
        """The only line of a command that fails."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.splitlines()
        return line


@pytest.fixture(scope="module")
def api() -> Iterator[ApiProxy]:
    with serve_api(ApiProxy()) as served:
        yield served


@pytest.fixture
def team(api: ApiProxy, tmp_path: Path) -> Team:
    return Team(api, tmp_path)


def test_jobs_are_suspended_and_resumed(team: Team) -> None:
    for name in ("night", "shift"):
        team.jobs.add(name)
    saved = "suspended: it saves a checkpoint first"
    assert team.done("suspend", "night", "shift") == f"night is {saved}\nshift is {saved}\n"
    assert [job["spec"]["suspend"] for job in team.jobs.stored.values()] == [True, True]
    assert team.done("suspend", "night") == "night is suspended already\n"
    assert team.done("resume", "night") == "night is resumed\n"
    assert team.done("resume", "night") == "night is not suspended already\n"
    assert [job["spec"]["suspend"] for job in team.jobs.stored.values()] == [False, True]


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_job_that_has_ended_is_neither_suspended_nor_resumed(team: Team, phase: str) -> None:
    before = team.jobs.add("night", phase)
    for command in ("suspend", "resume"):
        assert team.denied(command, "night") == f"Error: night has ended ({phase}), so there is nothing to {command}"
    assert team.jobs.stored["night"] == before


def test_only_a_failed_job_is_retried_and_the_time_is_the_request(team: Team) -> None:
    team.jobs.add("flaky", "Training", {"retry": {"request": "2"}})
    assert team.denied("retry", "flaky") == "Error: flaky is Training, and only a failed job can be retried"
    assert team.jobs.stored["flaky"]["spec"]["retry"] == {"request": "2"}
    team.jobs.add("flaky", "Failed", {"retry": {"request": "2", "maxFailures": 1}})
    assert team.done("retry", "flaky") == "flaky is retried\n"
    retry = team.jobs.stored["flaky"]["spec"]["retry"]
    assert (retry["maxFailures"], datetime.fromisoformat(retry["request"]).utcoffset()) == (1, timedelta(0))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("n\n", ""), ("\n", ""), (None, ", because there was no answer: pass --yes to skip the question")],
)
def test_a_job_is_canceled_only_after_a_yes(team: Team, answer: str | None, reason: str) -> None:
    team.jobs.add("unwanted", "Training")
    result = team.run("cancel", "unwanted", answer=answer)
    assert result.exit_code == 1
    question = "Cancel unwanted, which is Training? (its checkpoints and prepared data are deleted)"
    assert question in result.stderr
    assert result.stderr.splitlines()[-1] == f"Error: unwanted is not canceled{reason}"
    assert "cancel" not in team.jobs.stored["unwanted"]["spec"]
    done = "unwanted is canceled: it cannot be resumed or retried\n"
    assert team.run("cancel", "unwanted", answer="y\n").stdout == done
    assert team.jobs.stored["unwanted"]["spec"]["cancel"] is True
    assert team.done("cancel", "unwanted", "--yes") == done


def test_a_job_that_has_ended_is_not_canceled_and_a_canceled_one_not_retried(team: Team) -> None:
    before = team.jobs.add("night", "Succeeded")
    said = "Error: night has ended (Succeeded), so there is nothing to cancel"
    assert team.denied("cancel", "night", "--yes") == said
    assert team.jobs.stored["night"] == before
    before = team.jobs.add("night", "Failed", {"cancel": True})
    assert team.denied("retry", "night") == "Error: night is canceled: create a job with another name"
    assert team.jobs.stored["night"] == before


@pytest.mark.parametrize("command", ["suspend", "resume", "retry", "cancel", "watch"])
def test_a_missing_job_is_named_with_its_namespace(team: Team, command: str) -> None:
    missing = 'Error: qlorajobs.qlora.dev "none" not found in the namespace people of the context here'
    assert team.denied(command, "none") == missing


def test_a_manifest_goes_into_the_namespace_that_it_names(team: Team, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "metadata": {"name": "placed", "namespace": "people"}}))
    del team.document["contexts"][0]["context"]["namespace"]
    team.save()
    assert team.run("submit", str(file)).stdout == "qlorajob.qlora.dev/placed created\n"
    line = team.denied("submit", str(file), "--namespace", "default")
    assert "--namespace is default, and the manifest names the namespace people" in line


def test_an_invalid_manifest_ends_submit_with_the_exit_code_of_plan(team: Team, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "spec": {**MINIMAL["spec"], "lora": {"rank": -1}}}))
    for options in ([], ["--dry-run", "client"]):
        result = team.run("submit", str(file), *options)
        assert (result.exit_code, result.stdout) == (ExitCode.BAD_CONFIGURATION, "")
        assert "spec.lora.rank: found -1, must be greater than or equal to 1" in result.stderr
    named = team.run("submit", "--name", "x" * 46, "--model", "hf://org/m", "--data", "hf://org/rows")
    assert (named.exit_code, named.stderr.startswith('Error: --name: found "xxx')) == (ExitCode.BAD_CONFIGURATION, True)


def rows(table: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


def test_the_list_shows_progress_loss_and_gpu_hours(team: Team) -> None:
    done_at = {"step": 100, "totalSteps": 100, "percent": 100, "loss": 1.25, "summary": "100% 100/100", "remaining": ""}
    forecast = {"gpuHours": "12.50", "basis": "Measured", "cost": "31.25 EUR"}
    spent: dict[str, Any] = {"usage": {"gpuHours": "2.50", "cost": "6.25 EUR"}, "forecast": forecast}
    team.jobs.add("done", "Succeeded", kind="listed", progress=done_at, failures=1, disruptions=2, **spent)
    team.jobs.add("new", kind="listed")
    team.jobs.add("other", kind="other")
    header, *jobs = rows(team.done("list", "-l", "kind=listed"))
    assert header == ["Name", "Phase", "Progress", "Loss", "Left", "Recoveries", "GPU hours", "Age"]
    by_name = {row[0]: row[1:-1] for row in jobs}
    assert by_name == {
        "done": ["Succeeded", "100% 100/100", "1.250", "-", "3", "2.50"],
        "new": ["Pending", "-", "-", "-", "-", "-"],
    }
    wide = rows(team.done("list", "-l", "kind=listed", "-o", "wide"))
    assert wide[0] == [*header[:-1], "Cost", "Forecast", "Budget", "Age"]
    assert {row[0]: row[7:-1] for row in wide[1:]}["done"] == ["6.25 EUR", "12.50 (31.25 EUR)", "-"]
    everywhere = rows(team.done("list", "-A", "-l", "kind=listed"))
    assert [row[:2] for row in everywhere[1:]] == [["people", "done"], ["people", "new"]]
    listed = json.loads(team.done("list", "-l", "kind=listed", "-o", "json"))
    assert [job["status"].get("phase") for job in listed["items"]] == ["Succeeded", None]
    assert yaml.safe_load(team.done("list", "-l", "kind=listed", "-o", "yaml")) == listed


def test_an_empty_list_is_reported_on_stderr(team: Team) -> None:
    result = team.run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "No QLoRAJobs found in the namespace people.\n"


def test_a_job_is_watched_although_its_pods_and_events_cannot_be_read(team: Team) -> None:
    team.jobs.add("beside", "Failed", progress={"step": 3, "totalSteps": 9, "loss": 2.0}, lastFailure=FAILURE)
    team.api.weather = lambda request: (
        team.jobs(request) if "qlorajobs" in request.path else Reply(500 if "pods" in request.path else 400)
    )
    watched = team.run("watch", "beside")
    assert (watched.exit_code, watched.stderr) == (ExitCode.DIVERGED, "the weather is 400\n")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(404, b"404 page not found\n", {"Content-Type": "text/plain"}), "does not know QLoRAJobs: install the"),
        (Reply(401), "does not accept your credentials: log in again"),
        (Reply(500), "answered with HTTP 500: the weather is 500"),
        (Reply(502, b"<html>Bad gateway</html>"), "answered with HTTP 502: "),
        (Reply(200, b"<html>Log in</html>"), "has answered something else than an object"),
    ],
    ids=["no operator", "credentials", "error", "page", "portal"],
)
def test_an_answer_from_another_server_is_reported_in_one_sentence(team: Team, reply: Reply, words: str) -> None:
    team.api.weather = lambda _request: reply
    assert words in team.denied("list")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no kubeconfig can be read"),
        ("clusters: [", "the kubeconfig cannot be read: while parsing a flow node"),
        ("contexts: []\ncurrent-context: x\n", "no kubeconfig can be read"),
    ],
)
def test_an_invalid_kubeconfig_is_reported(team: Team, content: str | None, words: str) -> None:
    team.kubeconfig.unlink()
    if content is not None:
        team.kubeconfig.write_text(content)
    assert team.denied("list").startswith(f"Error: {words}")


def test_a_context_is_chosen_by_name_and_a_failed_credential_plugin_is_reported(team: Team) -> None:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "false", "interactiveMode": "Never"}
    team.document["users"].append({"name": "broken", "user": {"exec": plugin}})
    context = team.document["contexts"][0]["context"]
    team.document["contexts"] += [
        {"name": "away", "context": context | {"namespace": "away"}},
        {"name": "broken", "context": context | {"user": "broken"}},
    ]
    team.save()
    team.jobs.add("here")
    assert "here" in team.done("list", "--context", "here")
    assert "does not know QLoRAJobs" in team.denied("list", "--context", "away")
    line = team.denied("list", "--context", "mine")
    assert line == "Error: found the context 'mine', must be one of the kubeconfig: here, away, broken"
    line = team.denied("list", "--context", "broken")
    assert line.startswith("Error: the context broken gets no credentials from its plugin: exec: process returned 1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["suspend", "--kubeconfig", "FILE", "complete-too", "com"], ["plain,complete-me"]),
        (["suspend", "--kubeconfig", "FILE", "com"], ["plain,complete-me", "plain,complete-too"]),
        # Nothing is printed where the cluster is away.
        (["suspend", "--kubeconfig", "/nowhere", "com"], []),
    ],
)
def test_names_of_jobs_are_completed(team: Team, words: Sequence[str], expected: list[str]) -> None:
    for name in ("complete-me", "complete-too", "other"):
        team.jobs.add(name)
    line = " ".join(["qlora", *words]).replace("FILE", str(team.kubeconfig))
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words)), "_QLORA_COMPLETE": "bash_complete"}
    assert CliRunner().invoke(main, prog_name="qlora", env=environment).output.split() == expected
