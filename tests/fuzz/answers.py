"""The parsers of servers' answers, of logins, and of further files of users and models."""

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import requests
from obstore.exceptions import GenericError
from requests.adapters import HTTPAdapter

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.sources import ObjectStoreSource, RegistrySource
from qlora_cli.local.run import LocalRun
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.data.examples.example import Conversation
from qlora_trainer.data.examples.formats import RowReader
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.model.adapter.initial_check import check_config
from qlora_trainer.publishing.verify import verify_config
from qlora_trainer.stores.objects import ObjectFolder
from qlora_trainer.stores.registry import Registry
from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.target import Target, in_file, in_text
from tests.support.models.tiny import CHATML, save_tokenizer
from tests.support.resolved import resolved_lora
from tests.support.row_formats import CALLING, GOOD_ROWS

_HOST = "registry.example"
_SOURCE = RegistrySource(_HOST, "team/model", "v1", None)
_NO_SECRET = Secret(Path("/nowhere"), "spec.model.secretRef", None)
_BEARER = 'Bearer realm="https://registry.example/token",service="registry.example",scope="repository:a:pull"'
_CONFIGURATION, _DATASET, _UNAVAILABLE, _UNREACHABLE = (
    ExitCode.BAD_CONFIGURATION,
    ExitCode.BAD_DATASET,
    ExitCode.MODEL_UNAVAILABLE,
    ExitCode.UNREACHABLE,
)


def _pull(challenge: str, token: bytes, secret: Secret) -> None:
    """Ask a registry for a manifest; its token server answers with `token`."""

    def send(_adapter: HTTPAdapter, request: requests.PreparedRequest, **_: Any) -> requests.Response:
        answer = requests.Response()
        answer.request, answer.url = request, request.url or ""
        asked_again = "Authorization" in request.headers
        if not answer.url.startswith(f"https://{_HOST}/v2/"):
            answer.status_code, answer.raw = 200, io.BytesIO(token)
        else:
            answer.status_code, answer.raw = 404 if asked_again else 401, io.BytesIO()
            answer.headers["WWW-Authenticate"] = challenge
        return answer

    registry = Registry(_SOURCE, secret, allowed=(_HOST,), reject=model_unavailable)
    with mock.patch.object(HTTPAdapter, "send", send):
        assert registry.manifest("v1") is None


def _docker_login(path: Path) -> None:
    _pull("Basic realm=team", b"", Secret(path.parent, "spec.model.secretRef", "pull"))


def _google_key(path: Path) -> None:
    secret = Secret(path.parent, "spec.model.secretRef", "keys")
    ObjectFolder(ObjectStoreSource("team", "folder", "gs"), secret, reject=bad_configuration)


@cache
def _objects() -> ObjectFolder:
    return ObjectFolder(ObjectStoreSource("team", "folder"), _NO_SECRET, reject=bad_configuration)


def _store_error(message: str) -> None:
    with mock.patch("obstore.head", side_effect=GenericError(message)):
        _objects().stat()


def _adapter_config(path: Path) -> None:
    modules, base, revision = ("a.q_proj",), "org/model", "c0ffee"
    verify_config(
        path, resolved_lora(), target_modules=modules, whole_modules=(), base_name=base, base_revision=revision
    )


def _run(content: bytes, folder: Path) -> None:
    records = WorkspaceLayout(folder).records
    records.mkdir(exist_ok=True)
    (records / "job.json").write_bytes(DOCUMENTS["document"].seeds[0])
    (records / "run.json").write_bytes(content)
    assert LocalRun.recall(folder).device in ("cuda", "cpu")


@cache
def _tokenizer() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


_EXAMPLES = [RowReader(good.format, None).read(Row("row 1", good.row, 1)) for good in GOOD_ROWS]


def _template(content: bytes, folder: Path) -> None:
    for name, file in _tokenizer().items():
        (folder / name).write_bytes(file)
    (folder / "chat_template.jinja").write_bytes(content)
    tokenizer = Tokenizer(folder)
    for conversation in (example for example in _EXAMPLES if isinstance(example, Conversation)):
        try:
            rendered = tokenizer.render(conversation, "row 1")
        except StepFailure as failure:
            if failure.exit_code is not _DATASET or not failure.message.startswith("row 1"):
                raise
        else:
            assert all(0 <= start <= end <= len(rendered.text) for start, end in rendered.targets)


_ADAPTER = f"""\
{{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/model", "revision": "c0ffee",
 "r": {resolved_lora().rank}, "lora_alpha": {resolved_lora().alpha}, "lora_dropout": {resolved_lora().dropout},
 "target_modules": ["a.q_proj"], "use_rslora": false, "use_dora": false, "bias": "none", "auto_mapping": null,
 "modules_to_save": null}}""".encode()
_LOGIN = b"""\
{"auths": {"registry.example": {"auth": "dGVhbTpwYXNzd29yZA=="},
           "other.example": {"username": "a", "password": "b"}}}"""
_USER = b'{"auths": {"registry.example": {"username": "team", "password": "password"}}}'
_KEY = b'{"private_key": "-----BEGIN PRIVATE KEY-----", "private_key_id": "1", "client_email": "a@b"}'
_STORE_ERRORS = (
    b"GET http://h/b: Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>",
    b"Generic S3 error: Received redirect without LOCATION, this normally indicates an incorrectly configured",
    b"error trying to connect: http://127.0.0.1:0",
)

ANSWERS: dict[str, Target] = {
    "challenge": Target(
        # As the client reads a header.
        lambda content, _: _pull(content.decode("latin-1"), b'{"token": "a"}', _NO_SECRET),
        (_BEARER.encode(), b'Basic realm="team"', b""),
        exit_codes=(_UNAVAILABLE, _UNREACHABLE, _CONFIGURATION),
    ),
    "token": Target(
        lambda content, _: _pull(_BEARER, content, _NO_SECRET),
        (b'{"token": "a", "expires_in": 300}', b'{"access_token": "a"}', b"{}"),
        exit_codes=(_UNAVAILABLE, _UNREACHABLE),
    ),
    "docker-login": Target(
        in_file(".dockerconfigjson", _docker_login),
        (_LOGIN, _USER),
        exit_codes=(_CONFIGURATION, _UNREACHABLE, _UNAVAILABLE),
    ),
    "google-key": Target(
        in_file("GOOGLE_SERVICE_ACCOUNT_KEY", _google_key), (_KEY,), exit_codes=(_CONFIGURATION, _UNREACHABLE)
    ),
    "store-error": Target(in_text(_store_error), _STORE_ERRORS, exit_codes=(_CONFIGURATION, _UNREACHABLE)),
    "adapter-config": Target(
        in_file("adapter_config.json", _adapter_config), (_ADAPTER,), exit_codes=(ExitCode.INTERNAL_ERROR,)
    ),
    "initial-adapter-config": Target(
        in_file("adapter_config.json", lambda path: check_config(path, "hf://org/adapter", resolved_lora())),
        (_ADAPTER,),
        exit_codes=(_CONFIGURATION,),
    ),
    "run": Target(_run, (b'{"device": "cpu", "claims": {"data": "/data"}, "configMaps": {}}',), (ValueError,)),
    "template": Target(_template, (CHATML.encode(), CALLING.encode()), exit_codes=(_CONFIGURATION, _DATASET)),
}
