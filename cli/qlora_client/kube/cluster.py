"""Sends requests to a cluster with the user's rights: the only importer of the Kubernetes client.

Requests are made by path, because the client's classes for the core API take a second to import.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self

from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.dynamic import DynamicClient
from urllib3.exceptions import HTTPError, ReadTimeoutError
from yaml import YAMLError

from qlora_client.kube import errors
from qlora_client.kube.channels import PROTOCOL, Socket, standard_output
from qlora_client.kube.errors import ClusterError, ForbiddenError, MissingError
from qlora_client.kube.resources import ACCESS_REVIEWS, EXEC, LOGS, Request, Resource, page

Object = dict[str, Any]

_PAGE = 500
"""Objects in one answer to a list."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 60
_WATCH_SECONDS = 45
"""Seconds until the server ends a watch, so that a dead connection is noticed soon after."""
_SILENT_SECONDS = 60
"""Seconds without a byte until a stream is closed: its connection may have died."""
_MERGE_PATCH = "application/merge-patch+json"
_GONE = 410
_KUBECONFIG = "set KUBECONFIG, or name one with --kubeconfig, in Python with config_file"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]*")
"""Of an object. The server reads a slash as the end of it, also one that is escaped: `demo/status` would be `demo`."""
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class LogEntry:
    """A line of a pod's log."""

    time: datetime
    """When it was printed, by the node's clock, in UTC and to the microsecond."""
    text: str


class _NoDiscovery:
    """Skips discovery: paths are fixed."""

    def __init__(self, _client: DynamicClient, _cache_file: str | None) -> None:
        pass


class Cluster:
    """One cluster, as one user sees it in `namespace`. Methods raise ClusterError."""

    def __init__(
        self, client: DynamicClient, name: str, namespace: str, warn: Callable[[str], None] = lambda _text: None
    ) -> None:
        """Set the `name` for messages, and `warn` for the API server's warnings."""
        self._client = client
        self._name = name
        self._warn = warn
        self.namespace = namespace

    @classmethod
    def connect(
        cls,
        *,
        context: str | None = None,
        namespace: str | None = None,
        kubeconfig: str | None = None,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> Self:
        """Connect by kubeconfig or as this pod's service account. Sends nothing yet."""
        try:
            contexts, active = config.list_kube_config_contexts(kubeconfig)
        except ConfigException as error:
            if kubeconfig is None and context is None and _OWN_NAMESPACE.is_file():
                return cls._of_this_pod(namespace, warn)
            raise ClusterError(f"no kubeconfig can be read ({_one_line(error)}): {_KUBECONFIG}") from None
        except (OSError, YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ClusterError(f"the kubeconfig cannot be read: {_one_line(error)}") from None
        names = [each["name"] for each in contexts]
        if context is not None and context not in names:
            raise ClusterError(f"found the context {context!r}, must be one of the kubeconfig: {', '.join(names)}")
        chosen = next((each for each in contexts if each["name"] == context), active)
        name = f"the context {chosen['name']}"
        try:
            with _logged_errors() as logged:
                client = config.new_client_from_config(kubeconfig, context=chosen["name"])
        except (ConfigException, OSError, ValueError, LookupError, TypeError) as error:
            raise ClusterError(f"{name} of the kubeconfig cannot be used: {_one_line(error)}") from None
        if logged:
            raise ClusterError(f"{name} gets no credentials from its plugin: {logged[0]}")
        found = namespace or chosen["context"].get("namespace") or "default"
        return cls(DynamicClient(client, discoverer=_NoDiscovery), name, found, warn)

    @classmethod
    def _of_this_pod(cls, namespace: str | None, warn: Callable[[str], None]) -> Self:
        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except ConfigException as error:
            raise ClusterError(f"this pod's service account cannot be used: {_one_line(error)}") from None
        client = DynamicClient(ApiClient(configuration), discoverer=_NoDiscovery)
        return cls(client, "this pod's cluster", namespace or _OWN_NAMESPACE.read_text().strip(), warn)

    def find(
        self, resource: Resource, *, everywhere: bool = False, selector: str = "", fields: str = ""
    ) -> list[Object]:
        """Return objects of one or all namespaces, by `selector` and `fields`."""
        request = Request("list", resource, None if everywhere else self._scope(resource))
        found: list[Object] = []
        more = ""
        while True:
            query = {"limit": str(_PAGE), "labelSelector": selector, "fieldSelector": fields, "continue": more}
            answer = self._answer(request, "GET", query=query)
            found += answer["items"]
            more = answer["metadata"].get("continue", "")
            if not more:
                return found

    def get(self, resource: Resource, name: str) -> Object:
        """One object. Raises MissingError."""
        return self._answer(self._about("get", resource, name), "GET")

    def create(self, resource: Resource, body: Object, *, dry_run: bool = False) -> Object:
        """The object as the API server has stored it, or would (`dry_run`). Raises RejectedError.

        A field that the schema does not have is rejected, as `kubectl create` does.
        """
        query = {"fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        return self._answer(Request("create", resource, self.namespace), "POST", query=query, body=body)

    def merge(self, resource: Resource, name: str, change: Object) -> Object:
        """The object after a JSON merge patch. Raises MissingError and RejectedError."""
        request = self._about("patch", resource, name)
        return self._answer(request, "PATCH", body=change, content_type=_MERGE_PATCH)

    def delete(self, resource: Resource, name: str, uid: str) -> None:
        """Delete this very object. Raises MissingError and RejectedError."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._answer(self._about("delete", resource, name), "DELETE", body=options)

    def changes(self, resource: Resource, name: str, version: str) -> Iterator[Object]:
        """The object after each change since `version`, its resourceVersion. Raises MissingError once it is deleted.

        Ends after a while, or when that version is too old for the server: get the object again and continue.
        """
        request = Request("watch", resource, self.namespace)
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        for line in self._lines(request, query):
            event = self._parsed(line)
            changed: Object = event["object"]
            if event["type"] == "ERROR":
                if changed.get("code") == _GONE:
                    return
                raise errors.answered(self._name, request, changed.get("code", 0), "", json.dumps(changed))
            if event["type"] == "DELETED":
                raise errors.deleted(self._name, request, name)
            yield changed

    def log(
        self, pod: str, container: str, *, follow: bool = False, since: datetime | None = None
    ) -> Iterator[LogEntry]:
        """The lines that the container has printed, from the second of `since` on. Raises MissingError.

        With `follow`, until it ends, but no longer than a minute without a line: read on with `since` then.
        """
        query = {
            "container": container,
            "follow": "true" if follow else "",
            "timestamps": "true",
            "sinceTime": f"{since:%Y-%m-%dT%H:%M:%SZ}" if since else "",
        }
        for line in self._lines(Request("get", LOGS, self.namespace, pod), query):
            time, _, text = line.partition(" ")
            try:
                yield LogEntry(datetime.fromisoformat(time).astimezone(UTC), text)
            except ValueError:
                # The kubelet's answer in place of a log that it does not have.
                raise MissingError(f"the log of the pod {pod} cannot be read: {line}") from None

    def may(self, verb: str, resource: Resource) -> bool:
        """Whether the user has this right in the namespace."""
        wanted = {
            "namespace": self.namespace,
            "verb": verb,
            "group": resource.group,
            "resource": resource.plural,
            "subresource": resource.subresource,
        }
        request = Request("create", ACCESS_REVIEWS, None)
        answer = self._answer(request, "POST", body={"spec": {"resourceAttributes": wanted}})
        return bool(answer["status"].get("allowed"))

    def exec(self, pod: str, container: str, command: Sequence[str]) -> Iterator[bytes]:
        """The command's standard output in the container, as it arrives.

        Raises CommandError, with the end of its standard error, if it fails.
        """
        # Imported here: it takes a tenth of a second, and few commands need it.
        from websocket import WebSocketBadStatusException, WebSocketException

        request = Request("create", EXEC, self.namespace, pod)
        options = [("container", container), ("stdout", "true"), ("stderr", "true")]
        query = [*(("command", word) for word in command), *options]
        try:
            with closing(self._open_channels(request, query)) as socket:
                yield from standard_output(socket)
        except WebSocketBadStatusException as error:
            answer = error.resp_body or b""
            raise errors.answered(self._name, request, error.status_code, "", answer) from None
        except (WebSocketException, OSError) as error:
            raise errors.unreachable(self._name, self._client.configuration.host, error) from None

    def page(self, path: str) -> Object:
        """Return a page of the API server, as of OpenAPI. Raises MissingError."""
        return self._answer(Request("get", page(path), None), "GET")

    def server(self) -> tuple[str, datetime]:
        """The API server's version, such as v1.31.2, and the time by its clock."""
        request = Request("get", page("/version"), None)
        with self._explained(request):
            response = self._send(request, "GET", {}, _ANSWER_SECONDS, None, "application/json")
            content: bytes = response.data
        given = response.headers.get("Date")
        now = parsedate_to_datetime(given) if given else datetime.now(UTC)
        return str(self._parsed(content).get("gitVersion")), now

    def within(self, namespace: str) -> "Cluster":
        """The same cluster with another namespace."""
        return Cluster(self._client, self._name, namespace, self._warn)

    def _about(self, verb: str, resource: Resource, name: str) -> Request:
        if not _NAME.fullmatch(name):
            raise MissingError(f"no object of {resource.plural} can have the name {name!r}")
        return Request(verb, resource, self._scope(resource), name)

    def _scope(self, resource: Resource) -> str | None:
        return self.namespace if resource.namespaced else None

    def _open_channels(self, request: Request, query: list[tuple[str, str]]) -> Socket:
        """Use only the client's connection: its reader keeps all output in memory."""
        from kubernetes.stream.ws_client import create_websocket, get_websocket_url

        configuration = self._client.configuration
        token = configuration.auth_settings().get("BearerToken", {}).get("value")
        headers = {"sec-websocket-protocol": PROTOCOL} | ({"authorization": token} if token else {})
        url = configuration.host + request.resource.path(request.namespace, request.name)
        socket: Socket = create_websocket(configuration, get_websocket_url(url, query), headers)
        socket.settimeout(_SILENT_SECONDS)
        return socket

    def _answer(
        self,
        request: Request,
        method: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        with self._explained(request):
            response = self._send(request, method, query or {}, _ANSWER_SECONDS, body, content_type)
            content: bytes = response.data
        return self._parsed(content)

    def _lines(self, request: Request, query: Mapping[str, str]) -> Iterator[str]:
        """Yield an answer's lines as they arrive, until it ends or nothing arrives."""
        with self._explained(request):
            response = self._send(request, "GET", query, _SILENT_SECONDS, None, "application/json")
            rest = b""
            try:
                for block in response.stream(2**16, decode_content=True):
                    *lines, rest = (rest + block).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
            except ReadTimeoutError:
                return
            finally:
                response.close()
            if rest:
                yield rest.decode(errors="replace")

    def _send(
        self,
        request: Request,
        method: str,
        query: Mapping[str, str],
        seconds: float,
        body: Object | None,
        content_type: str,
    ) -> Any:
        response = self._client.request(
            method,
            request.resource.path(request.namespace, request.name),
            body=body,
            query_params=[(key, value) for key, value in query.items() if value],
            content_type=content_type,
            serialize=False,
            _request_timeout=(_CONNECT_SECONDS, seconds),
        )
        for warning in response.headers.getlist("Warning"):
            self._warn(warning.split('"')[1] if '"' in warning else warning)
        return response

    def _parsed(self, content: bytes | str) -> Object:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ClusterError(f"{self._name} has answered something else than an object: {content[:80]!r}")
        return answer

    @contextmanager
    def _explained(self, request: Request) -> Iterator[None]:
        """Turn the client's errors into sentences."""
        try:
            yield
        except ApiException as error:
            reason = str(error.reason or "")
            raise errors.answered(self._name, request, error.status or 0, reason, error.body or "") from None
        except HTTPError as error:
            raise errors.unreachable(self._name, self._client.configuration.host, error) from None


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collect the errors that the body logs, such as failed credential plugins."""
    logged: list[str] = []

    class _Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(" ".join(record.getMessage().split()))

    keeper = _Keeper(logging.ERROR)
    logging.getLogger().addHandler(keeper)
    try:
        yield logged
    finally:
        logging.getLogger().removeHandler(keeper)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")


Rights = Mapping[Resource, Sequence[str]]
"""The verbs that are needed, by resource."""


def lacking(cluster: Cluster, needed: Rights) -> dict[Resource, list[str]]:
    """The rights that the user lacks in the namespace."""
    denied = {kind: [verb for verb in verbs if not cluster.may(verb, kind)] for kind, verbs in needed.items()}
    return {kind: verbs for kind, verbs in denied.items() if verbs}


def rules(rights: Mapping[Resource, Iterable[str]]) -> str:
    """The rules that allow them, as they are written in a Role."""
    return ", ".join(kind.rule(*verbs) for kind, verbs in rights.items())


def require(cluster: Cluster, needed: Rights, purpose: str) -> None:
    """Raise ForbiddenError that names every missing rule, unless the user has all."""
    denied = lacking(cluster, needed)
    if denied:
        raise ForbiddenError(
            f"{purpose} takes rights that you lack in the namespace {cluster.namespace}: ask for a Role with "
            f"{'the rule' if len(denied) == 1 else 'the rules'} {rules(denied)}"
        )
