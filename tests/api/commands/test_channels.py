"""`qlora promote`, `rollback` and `channels`: the records in a real ConfigMap, and the servers that follow them."""

import json
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from devcluster.controlplane import ControlPlane
from qlora_api.channel import Channel, ChannelStatement
from qlora_cli.__main__ import main
from qlora_trainer.publishing.signing import verify_bundle
from tests.support.cluster.reported import Reported, reported
from tests.support.services.api_proxy import ApiProxy, Request, serve_api

JOBS = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["get"]}
BOTH = {"first": "a" * 64, "second": "b" * 64}
KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    """A namespace with two jobs that can be promoted."""
    with reported(plane, tmp_path_factory.mktemp("kubelet"), "promoters") as team:
        for name, sha256 in BOTH.items():
            rows = {"source": "hf://org/rows", "eval": {"source": "hf://org/held-out"}}
            team.job(name, {"gate": {"minImprovement": 0.1}, "dataset": rows})
            adapter = {
                "uri": f"hf://org/{name}",
                "sha256": sha256,
                "sizeBytes": 1,
                "baseModel": "hf://org/model",
                "baseRevision": "c0ffee",
                "rank": 16,
                "quantization": "nf4",
                "lineage": "signed",
            }
            team.report(name, "Succeeded", adapter=adapter, gate={"passed": True, "adapterSha256": sha256})
        yield team


@pytest.fixture
def config_map(team: Reported) -> Iterator[None]:
    """No ConfigMap of channels, before and after."""
    yield
    team.kubectl("delete", "configmap", "qlora-channels", "--ignore-not-found")


@pytest.fixture
def keys(tmp_path: Path) -> Mapping[str, str]:
    """The options --key of two keys."""
    for name, key in (("key", KEY), ("other", OTHER_KEY)):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / name).write_bytes(pem)
    return {"key": f"--key={tmp_path / 'key'}", "other": f"--key={tmp_path / 'other'}"}


def run(team: Reported, *arguments: str, kubeconfig: Path | None = None) -> Result:
    options = ("--namespace", team.namespace, "--kubeconfig", str(kubeconfig or team.plane.kubeconfig))
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def done(team: Reported, *arguments: str) -> str:
    result = run(team, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def rejected(team: Reported, *arguments: str, kubeconfig: Path | None = None) -> str:
    """The only line of a command that fails and writes nothing."""
    result = run(team, *arguments, kubeconfig=kubeconfig)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    [line] = result.stderr.splitlines()
    return line


def stored(team: Reported) -> dict[str, str]:
    return dict(json.loads(team.kubectl("get", "configmap", "qlora-channels", "--output=json"))["data"])


def record(team: Reported, key: Ed25519PrivateKey | None = None) -> Channel:
    """The channel bot@prod, signed with the key if there is one."""
    content = stored(team)["bot.prod.channel"].encode()
    statement = ChannelStatement.model_validate_json(verify_bundle(content, key.public_key()) if key else content)
    channel = statement.predicate
    [subject] = statement.subject
    assert (subject.name, subject.digest["sha256"]) == (str(channel.name_of(channel.adapter)), channel.adapter.sha256)
    return channel


@pytest.mark.usefixtures("config_map")
def test_a_channel_is_promoted_and_rolled_back(team: Reported) -> None:
    said = done(team, "promote", "first", "bot@prod")
    assert said == f"bot@prod leads to promoters/first@sha256:{BOTH['first']} (promotion 1)\n"
    labels = json.loads(team.kubectl("get", "configmap", "qlora-channels", "--output=json"))["metadata"]["labels"]
    assert labels == {"qlora.dev/channels": "true"}
    assert done(team, "promote", "second", "bot@prod", "--percent", "10").endswith(
        " for 10% of conversations (promotion 2)\n"
    )
    assert done(team, "promote", "second", "bot@prod").endswith(f"{BOTH['second']} (promotion 3)\n")
    before = stored(team)
    assert done(team, "promote", "second", "bot@prod").endswith("(promotion 3) already\n")
    assert stored(team) == before
    found = record(team)
    assert (found.sequence, found.adapter.job, found.percent) == (3, "second", None)
    assert [(each.job, each.uri) for each in found.previous] == [("first", "hf://org/first")]
    done(team, "rollback", "bot@prod")
    back = record(team)
    assert (back.sequence, back.adapter.job, back.previous) == (4, "first", ())
    assert "has no earlier adapter to go back to" in rejected(team, "rollback", "bot@prod")


@pytest.mark.usefixtures("config_map")
def test_of_two_promotions_at_once_none_is_lost(team: Reported, tmp_path: Path) -> None:
    done(team, "promote", "first", "bot@prod")

    def promote_another(request: Request) -> None:
        if request.method == "PATCH":
            proxy.weather = lambda _request: None
            done(team, "promote", "first", "other@prod")

    proxy = ApiProxy(team.plane.server.removeprefix("https://"), team.plane.directory / "certificates" / "ca.crt")
    proxy.weather = promote_another
    maps = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "patch"]}
    with serve_api(proxy):
        slower = team.kubeconfig(tmp_path, "slower", JOBS, maps, server=proxy.url)
        line = rejected(team, "promote", "second", "bot@prod", kubeconfig=slower)
        assert "the object has been modified; please apply your changes to the latest version" in line
        assert (sorted(stored(team)), record(team).adapter.job) == (["bot.prod.channel", "other.prod.channel"], "first")
        assert run(team, "promote", "second", "bot@prod", kubeconfig=slower).exit_code == 0
    assert (record(team).sequence, record(team).adapter.job) == (2, "second")


def test_the_config_map_of_another_program_is_left_alone(team: Reported) -> None:
    team.kubectl("create", "configmap", "foreign", "--from-literal=a=b")
    for command in (("promote", "first", "bot@prod"), ("rollback", "bot@prod"), ("channels",)):
        line = rejected(team, *command, "--config-map", "foreign")
        assert line.startswith('Error: the ConfigMap foreign has no label qlora.dev/channels: "true"')
    assert json.loads(team.kubectl("get", "configmap", "foreign", "--output=json"))["data"] == {"a": "b"}


@pytest.mark.usefixtures("config_map")
def test_a_signed_record_is_replaced_only_by_one_of_a_key(team: Reported, keys: Mapping[str, str]) -> None:
    done(team, "promote", "first", "bot@prod", keys["key"])
    done(team, "promote", "second", "bot@prod", keys["key"])
    assert [each.job for each in record(team, KEY).previous] == ["first"]
    before = stored(team)
    for command in (("promote", "first", "bot@prod"), ("rollback", "bot@prod")):
        assert "the record of bot@prod is signed: pass the private key with --key" in rejected(team, *command)
    assert stored(team) == before
    done(team, "rollback", "bot@prod", keys["key"])
    assert (record(team, KEY).sequence, record(team, KEY).adapter.job) == (3, "first")


@pytest.mark.usefixtures("config_map")
@pytest.mark.parametrize("forger", [None, "other"])
def test_a_key_signs_no_adapter_of_a_record_that_it_has_not_signed(
    team: Reported, keys: Mapping[str, str], forger: str | None
) -> None:
    forged = (keys[forger],) if forger else ()
    done(team, "promote", "first", "bot@prod", *forged)
    assert "no earlier adapter" in run(team, "promote", "second", "bot@prod", "--percent=5", keys["key"]).stderr
    result = run(team, "promote", "first", "bot@prod", keys["key"])
    assert result.exit_code == 0
    assert "not signed with this key: its earlier adapters are dropped" in result.stderr
    found = record(team, KEY)
    assert (found.sequence, found.adapter.job, found.previous) == (2, "first", ())


@pytest.mark.usefixtures("config_map")
def test_a_record_that_was_copied_from_another_channel_is_rejected(team: Reported) -> None:
    done(team, "promote", "first", "bot@staging")
    copied = {"bot.prod.channel": stored(team)["bot.staging.channel"], "broken.prod.channel": "{}"}
    team.kubectl("patch", "configmap", "qlora-channels", "--type=merge", f"--patch={json.dumps({'data': copied})}")
    line = rejected(team, "promote", "second", "bot@prod")
    assert "bot.prod.channel of the ConfigMap qlora-channels is no record of bot@prod: it is of" in line
    listed = run(team, "channels")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["Channel", "bot@staging"]
    assert "Warning: broken.prod.channel of the ConfigMap qlora-channels is no record of a channel" in listed.stderr


@pytest.mark.usefixtures("config_map")
def test_a_missing_right_is_named_as_a_rule(team: Reported, tmp_path: Path) -> None:
    maps = {"apiGroups": [""], "resources": ["configmaps"]}
    rule = 'Role with the rule {{apiGroups: [""], resources: ["configmaps"], verbs: ["{}"]}}'
    nothing = team.kubeconfig(tmp_path, "no-promoter", JOBS)
    reader = team.kubeconfig(tmp_path, "reader", JOBS, maps | {"verbs": ["get"]})
    promoter = team.kubeconfig(tmp_path, "promoter", JOBS, maps | {"verbs": ["get", "create", "patch"]})
    command = ("promote", "first", "bot@prod")
    assert rejected(team, *command, kubeconfig=nothing).endswith(f"ask for a {rule.format('get')}")
    assert rejected(team, *command, kubeconfig=reader).endswith(f"ask for a {rule.format('create')}")
    assert run(team, *command, kubeconfig=promoter).exit_code == 0
    assert rejected(team, "promote", "second", "bot@prod", kubeconfig=reader).endswith(rule.format("patch"))
    assert run(team, "promote", "second", "bot@prod", kubeconfig=promoter).exit_code == 0
    assert run(team, "channels", kubeconfig=reader).exit_code == 0


class Server(ThreadingHTTPServer):
    """Answers as vLLM with the plugin, to those who have its API key."""

    channels: Callable[[], list[dict[str, Any]]] = list

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/qlora/adapters"
        allowed = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        answer = {"base": {}, "channels": self.server.channels() if allowed else [], "adapters": []}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with Server(("127.0.0.1", 0), _Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answer(sequence: int, job: str, problem: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    name = f"promoters/{job}@sha256:{BOTH[job]}"
    fields = {"sequence": sequence, "adapter": name, "percent": None, "previous": None, "problem": problem}
    return [{"name": "promoters/bot@prod", **fields}]


@pytest.mark.usefixtures("config_map")
def test_a_promotion_ends_when_each_server_has_switched(team: Reported, server: Server) -> None:
    done(team, "promote", "first", "bot@prod")
    states = iter([answer(1, "first"), answer(2, "second"), answer(2, "second")])
    server.channels = lambda: next(states)
    said = done(team, "promote", "second", "bot@prod", f"--server={server.url}", f"--server={server.url}/")
    assert said.splitlines()[1:] == [f"{server.url} serves it", f"{server.url}/ serves it"]


@pytest.mark.usefixtures("config_map")
def test_a_promotion_fails_with_the_reason_of_the_server(
    team: Reported, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(team, "promote", "first", "bot@prod")
    server.channels = lambda: answer(1, "first", {"sequence": 2, "reason": "its rank is 64"})
    failed = run(team, "promote", "second", "bot@prod", f"--server={server.url}")
    assert failed.exit_code == 1
    hint = "roll back with: qlora rollback bot@prod --namespace promoters"
    assert failed.stderr == (f"Error: {server.url} does not serve promotion 2 of bot@prod: its rank is 64; {hint}\n")
    # The command is repeated to wait again.
    server.channels = lambda: answer(1, "first")
    late = run(team, "promote", "second", "bot@prod", f"--server={server.url}", "--timeout=0")
    assert (late.exit_code, "not within 0 s: it has not seen the record" in late.stderr) == (1, True)
    monkeypatch.delenv("VLLM_API_KEY")
    assert "HTTP 401: set VLLM_API_KEY" in run(team, "promote", "second", "bot@prod", f"--server={server.url}").stderr


@pytest.mark.usefixtures("config_map")
def test_channels_are_listed_with_what_servers_serve(team: Reported, server: Server, keys: Mapping[str, str]) -> None:
    assert "No channels found in the ConfigMap qlora-channels" in run(team, "channels").stderr
    done(team, "promote", "first", "bot@prod", keys["key"])
    done(team, "promote", "second", "bot@prod", "--percent=10", keys["key"])
    server.channels = lambda: answer(1, "first", {"sequence": 2, "reason": "[rank] is 64"})
    away = "http://127.0.0.1:9"
    title, row = done(team, "channels", f"--server={server.url}", f"--server={away}").splitlines()
    promoted_at = record(team, KEY).promoted_at
    assert row.split(maxsplit=7)[:7] == ["bot@prod", "second", "bbbbbbbbbbbb", "10%", "2", promoted_at, "yes"]
    assert title.split()[-2:] == [server.url, away]
    assert "aaaaaaaaaaaa ([rank] is 64)" in row
    assert f"- (the server cannot be reached at {away}: Connection refused)" in row
    [item] = json.loads(done(team, "channels", f"--server={server.url}", "-o", "json"))["items"]
    assert (item["name"], item["signed"], item["previous"][0]["job"]) == ("bot@prod", True, "first")
    assert item["servers"][server.url]["problem"] == {"sequence": 2, "reason": "[rank] is 64"}
