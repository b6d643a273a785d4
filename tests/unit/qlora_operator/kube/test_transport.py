"""Requests to a server on this machine: which credentials they carry, and which way they go."""

import asyncio
import json
import ssl
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.config import incluster_config

from devcluster.certificates import Authority
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect, endpoint_of
from qlora_operator.kube.errors import ClusterError, RejectedError
from qlora_operator.kube.transport import TooLongError, as_go_writes
from tests.support.builders import NAME, UID, job_body, make_job, present

PLUGIN = """
import json, pathlib, sys
count = pathlib.Path(sys.argv[1])
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
status = {"token": f"token-{number}", "expirationTimestamp": "2020-01-01T00:00:00Z"}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


class Server:
    """Answers with one QLoRAJob, and keeps requests. `expired`: a rejected token. `moved_to`: of a redirect."""

    def __init__(self) -> None:
        self.expired = self.moved_to = ""
        self.asked = asyncio.Event()
        self.requests: list[tuple[str, str, str]] = []
        self.connections: set[Any] = set()
        self.bodies: list[Any] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path_qs, request.headers.get("Authorization", "")))
        self.connections.add(request.transport)
        self.asked.set()
        self.bodies.append(await request.text())
        if self.moved_to:
            raise web.HTTPFound(self.moved_to)
        if self.expired and self.expired in self.requests[-1][2]:
            return web.json_response({"message": "Unauthorized"}, status=401)
        return web.json_response(job_body())


def write_kubeconfig(folder: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return folder / "kubeconfig"


def against(
    work: Callable[[Server, Cluster], Awaitable[None]], folder: Path, user: dict[str, Any], **cluster: Any
) -> None:
    """Run `work` against a server that a kubeconfig names."""

    async def scenario() -> None:
        server = Server()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", server.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = runner.addresses[0]
        kubeconfig = write_kubeconfig(folder, {"server": f"http://{address[0]}:{address[1]}"} | cluster, user)
        try:
            async with connect(kubeconfig) as connected:
                await work(server, connected)
        finally:
            await runner.cleanup()

    asyncio.run(scenario())


def test_a_token_that_has_expired_is_replaced_without_a_restart(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    arguments = [str(tmp_path / "plugin.py"), str(tmp_path / "count")]
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": arguments}

    async def work(server: Server, cluster: Cluster) -> None:
        assert await cluster.get_qlora_job("team", "tune") == job_body()
        server.expired = "token-1"
        both = await asyncio.gather(*(cluster.get_qlora_job("team", "tune") for _ in range(2)))
        assert both == [job_body(), job_body()]
        sent = [authorization for _, _, authorization in server.requests]
        assert sent == ["Bearer token-1"] * 3 + ["Bearer token-2"] * 2

    against(work, tmp_path, {"exec": plugin | {"interactiveMode": "Never"}})


def test_each_request_is_observed_with_its_status_or_none_without_an_answer(tmp_path: Path) -> None:
    seen: list[tuple[str, str, int | None]] = []
    path = "/apis/qlora.dev/v1beta1/namespaces/team/qlorajobs/tune"

    def observe(method: str, path: str, status: int | None, seconds: float) -> None:
        assert seconds >= 0
        seen.append((method, path, status))

    async def work(server: Server, cluster: Cluster) -> None:
        cluster._transport._on_request = observe
        await cluster.get_qlora_job("team", "tune")
        server.expired = "token"
        with pytest.raises(ClusterError):
            await cluster.get_qlora_job("team", "tune")
        # The API server has still answered.
        server.expired = ""
        with pytest.raises(TooLongError):
            await cluster._transport.send("GET", path, headers={}, most=1)
        # The answer would have been unknown.
        cancelled = asyncio.create_task(cluster._transport.send("GET", path, headers={}))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        cluster._transport._endpoint = replace(cluster._transport._endpoint, server="http://127.0.0.1:1")
        with pytest.raises(ClusterError):
            await cluster.get_qlora_job("team", "tune")

    against(work, tmp_path, {"token": "token"})
    assert seen == [("GET", path, status) for status in (200, 401, 200, None)]


def test_an_answer_that_is_longer_than_it_may_be_is_not_read_to_its_end(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        with pytest.raises(TooLongError):
            await cluster._transport.send("GET", "/", headers={}, most=100)
        length = len(json.dumps(job_body()))
        assert (await cluster._transport.send("GET", "/", headers={}, most=length))[0] == 200
        assert await cluster.get_qlora_job("team", "tune") == job_body()

    against(work, tmp_path, {"token": "t"})


def test_a_redirect_is_not_followed_with_the_credentials(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        server.moved_to = "/elsewhere"
        with pytest.raises(ClusterError, match="status 302"):
            await cluster.get_qlora_job("team", "tune")
        assert len(server.requests) == 1

    against(work, tmp_path, {"token": "t"})


def test_only_the_object_that_was_read_is_deleted_or_gets_a_status(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        await cluster.delete_job("team", "tune-train-1", "of the Job")
        await cluster.apply_status(make_job(), {})
        deletion, written = map(json.loads, server.bodies)
        assert (deletion["preconditions"], deletion["propagationPolicy"]) == ({"uid": "of the Job"}, "Background")
        assert written["metadata"] == {"name": NAME, "uid": UID, "resourceVersion": make_job().resource_version}

    against(work, tmp_path, {"token": "t"})


def test_a_request_waits_for_its_turn_to_read_the_answer_and_not_to_be_sent(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        turn = asyncio.Semaphore(1)
        async with turn:
            asking = asyncio.create_task(cluster._transport.send("GET", "/", headers={}, turn=turn))
            async with asyncio.timeout(60):
                await server.asked.wait()
            await asyncio.sleep(0.1)
            assert not asking.done()
        assert (await asking)[0] == 200

    against(work, tmp_path, {"token": "t"})


def test_a_token_that_stays_rejected_is_an_error_and_not_retried_for_ever(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        server.expired = "t"
        with pytest.raises(RejectedError, match="Unauthorized"):
            await cluster.get_qlora_job("team", "tune")
        assert len(server.requests) == 1

    against(work, tmp_path, {"token": "t"})


def test_proxy_variables_and_netrc_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def work(server: Server, cluster: Cluster) -> None:
        await cluster.get_qlora_job("team", "tune")
        assert server.requests == [("GET", "/apis/qlora.dev/v1beta1/namespaces/team/qlorajobs/tune", "Bearer t")]

    against(work, tmp_path, {"token": "t"})


def test_a_number_outside_json_is_never_sent(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            await cluster.apply_status(make_job(), {"progress": {"loss": float("inf")}})
        assert server.requests == []

    against(work, tmp_path, {"token": "t"})


def test_the_proxy_that_the_configuration_names_is_used(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        with pytest.raises(ClusterError, match="Cannot connect"):
            await cluster.get_qlora_job("team", "tune")
        assert server.requests == []

    against(work, tmp_path, {"token": "t"}, **{"proxy-url": "http://127.0.0.1:1"})


def test_requests_share_a_connection_and_escape_selectors(tmp_path: Path) -> None:
    async def work(server: Server, cluster: Cluster) -> None:
        for _ in range(3):
            await cluster.list_pods("team", "a+b/c=d")
        assert len(server.connections) == 1
        assert "labelSelector=qlora.dev/job-uid%3Da%2Bb/c%3Dd" in server.requests[0][1].replace("%2F", "/")

    against(work, tmp_path, {"token": "t"})


def test_the_token_of_a_pod_is_read_again_when_the_server_rejects_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, authority = tmp_path / "token", tmp_path / "ca.crt"
    authority.write_bytes(Authority(datetime.now(UTC)).certificate)
    token.write_text("first")
    monkeypatch.setattr("qlora_operator.kube.connection._SERVICE_ACCOUNT_TOKEN", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")

    async def work() -> None:
        endpoint = await endpoint_of(None)
        assert endpoint.server == "https://[fd00::1]:443"
        assert (await endpoint.credentials()).authorization == "bearer first"
        token.write_text("second")
        await endpoint.renew()
        assert (await endpoint.credentials()).authorization == "bearer second"

    asyncio.run(work())


class Rotated:
    """A server on one port, with TLS certificates of one authority after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def serve(self, authority: Authority) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        identity = authority.issue("server", serves=["127.0.0.1"]).write(self._folder, "server")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*identity)
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", Server().answer)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context).start()
        self._port = self._runner.addresses[0][1]

    def trusting(self, authority: Path) -> Path:
        server = {"server": f"https://127.0.0.1:{self._port}", "certificate-authority": str(authority)}
        return write_kubeconfig(self._folder, server, {"token": "t"})

    async def end(self) -> None:
        await present(self._runner).cleanup()


def test_a_replaced_authority_is_read_again_and_the_old_one_distrusted(tmp_path: Path) -> None:
    first, second = (Authority(datetime.now(UTC)) for _ in range(2))
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(first.certificate)

    async def work() -> None:
        server = Rotated(tmp_path)
        await server.serve(first)
        async with connect(server.trusting(trusted)) as cluster:
            assert await cluster.get_qlora_job("team", "tune") == job_body()
            await server.serve(second)
            with pytest.raises(ClusterError, match="certificate verify failed"):
                await cluster.get_qlora_job("team", "tune")
            trusted.write_bytes(second.certificate)
            both = await asyncio.gather(*(cluster.get_qlora_job("team", "tune") for _ in range(2)))
            assert both == [job_body(), job_body()]
            await server.serve(first)
            with pytest.raises(ClusterError, match="certificate verify failed"):
                await cluster.get_qlora_job("team", "tune")
        await server.end()

    asyncio.run(work())


def test_json_is_encoded_as_the_api_server_encodes_it() -> None:
    assert (
        as_go_writes({"b": "é<&>\u2028", "a": [1, 0.5]}) == '{"b":"é\\u003c\\u0026\\u003e\\u2028","a":[1,0.5]}'.encode()
    )
    assert as_go_writes(json.loads('["half \\ud800"]')) == b'["half ?"]'
