"""The parsers of servers' answers, of logins, and of further files of users and models."""

import io
import json
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
from qlora_api.spec.training import LoraSpec
from qlora_cli.local.run import LocalRun
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.data.examples.example import Conversation, Message, ToolCall
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.model.adapter.initial_check import check_config
from qlora_trainer.publishing.verify import verify_config
from qlora_trainer.stores.objects import ObjectFolder
from qlora_trainer.stores.registry import Registry
from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.target import Target
from tests.support.models.tiny import CHATML, save_tokenizer

_HOST = "registry.example"
_SOURCE = RegistrySource(_HOST, "team/model", "v1", None)
_NO_SECRET = Secret(Path("/nowhere"), "spec.model.secretRef", None)
_BEARER = 'Bearer realm="https://registry.example/token",service="registry.example",scope="repository:a:pull"'
_CONFIGURATION, _DATASET, _UNAVAILABLE, _UNREACHABLE, _DEFECT = (
    ExitCode.BAD_CONFIGURATION,
    ExitCode.BAD_DATASET,
    ExitCode.MODEL_UNAVAILABLE,
    ExitCode.UNREACHABLE,
    ExitCode.INTERNAL_ERROR,
)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


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


def _challenge(content: bytes, _folder: Path) -> None:
    # As the client reads a header.
    _pull(content.decode("latin-1"), b'{"token": "a"}', _NO_SECRET)


def _token(content: bytes, _folder: Path) -> None:
    _pull(_BEARER, content, _NO_SECRET)


def _docker_login(content: bytes, folder: Path) -> None:
    (folder / ".dockerconfigjson").write_bytes(content)
    _pull("Basic realm=team", b"", Secret(folder, "spec.model.secretRef", "pull"))


def _google_key(content: bytes, folder: Path) -> None:
    (folder / "GOOGLE_SERVICE_ACCOUNT_KEY").write_bytes(content)
    secret = Secret(folder, "spec.model.secretRef", "keys")
    ObjectFolder(ObjectStoreSource("team", "folder", "gs"), secret, reject=bad_configuration)


@cache
def _objects() -> ObjectFolder:
    return ObjectFolder(ObjectStoreSource("team", "folder"), _NO_SECRET, reject=bad_configuration)


def _store_error(content: bytes, _folder: Path) -> None:
    with mock.patch("obstore.head", side_effect=GenericError(_text(content))):
        _objects().stat()


def _adapter_config(content: bytes, folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(content)
    verify_config(
        path,
        LoraSpec(),
        target_modules=("a.q_proj",),
        whole_modules=(),
        base_name="org/model",
        base_revision="c0ffee",
    )


def _initial_adapter_config(content: bytes, folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(content)
    check_config(path, "hf://org/adapter", LoraSpec())


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


_TALK = Conversation((Message("system", "s"), Message("user", "q"), Message("assistant", "a")))
_TALK_WITH_TOOLS = Conversation(
    (
        Message("user", "q"),
        Message("assistant", "", (ToolCall("f", {"n": 1}, "abcdefghi"),)),
        Message("tool", "r", name="f", tool_call_id="abcdefghi"),
        Message("assistant", "a"),
    ),
    ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},),
)


def _template(content: bytes, folder: Path) -> None:
    for name, file in _tokenizer().items():
        (folder / name).write_bytes(file)
    (folder / "chat_template.jinja").write_bytes(content)
    tokenizer = Tokenizer(folder)
    for conversation in (_TALK, _TALK_WITH_TOOLS):
        try:
            rendered = tokenizer.render(conversation, "row 1")
        except StepFailure as failure:
            if failure.exit_code is not _DATASET or not failure.message.startswith("row 1"):
                raise
        else:
            assert all(0 <= start <= end <= len(rendered.text) for start, end in rendered.targets)


_TOOLS_TEMPLATE = """\
{%- macro turn(role) %}<|im_start|>{{ role }}
{{ caller() }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(first=true) %}
{%- if tools %}{% call turn('system') %}{{ tools | tojson(indent=2) }}{% endcall %}{% endif %}
{%- for message in messages if message.role != 'ignored' %}
{%- if message.role == 'system' and not ns.first %}{{ raise_exception('late') }}{% endif %}
{%- set ns.first = false %}
{%- call turn(message['role']) %}{{ message.content | trim }}
{%- for call in message.tool_calls or [] %}{{ call.function.name ~ call.function.arguments | string }}{% endfor %}
{%- endcall %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
_ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/model",
    "revision": "c0ffee",
    "r": LoraSpec().rank,
    "lora_alpha": LoraSpec().alpha,
    "lora_dropout": LoraSpec().dropout,
    "target_modules": ["a.q_proj"],
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "auto_mapping": None,
    "modules_to_save": None,
}
_LOGIN = {"auths": {_HOST: {"auth": "dGVhbTpwYXNzd29yZA=="}, "other.example": {"username": "a", "password": "b"}}}
_USER = {"auths": {_HOST: {"username": "team", "password": "password"}}}

ANSWERS: dict[str, Target] = {
    "challenge": Target(
        _challenge,
        (_BEARER.encode(), b'Basic realm="team"', b""),
        exit_codes=(_UNAVAILABLE, _UNREACHABLE, _CONFIGURATION),
    ),
    "token": Target(
        _token,
        (_json({"token": "a", "expires_in": 300}), _json({"access_token": "a"}), b"{}"),
        exit_codes=(_UNAVAILABLE, _UNREACHABLE),
    ),
    "docker-login": Target(
        _docker_login, (_json(_LOGIN), _json(_USER)), exit_codes=(_CONFIGURATION, _UNREACHABLE, _UNAVAILABLE)
    ),
    "google-key": Target(
        _google_key,
        (_json({"private_key": "-----BEGIN PRIVATE KEY-----", "private_key_id": "1", "client_email": "a@b"}),),
        exit_codes=(_CONFIGURATION, _UNREACHABLE),
    ),
    "store-error": Target(
        _store_error,
        (
            b"GET http://h/b: Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>",
            b"Generic S3 error: Received redirect without LOCATION, this normally indicates an incorrectly configured",
            b"error trying to connect: http://127.0.0.1:0",
        ),
        exit_codes=(_CONFIGURATION, _UNREACHABLE),
    ),
    "adapter-config": Target(_adapter_config, (_json(_ADAPTER),), exit_codes=(_DEFECT,)),
    "initial-adapter-config": Target(_initial_adapter_config, (_json(_ADAPTER),), exit_codes=(_CONFIGURATION,)),
    "run": Target(
        _run,
        (_json({"device": "cpu", "claims": {"data": "/data"}, "configMaps": {}}),),
        (ValueError,),
    ),
    "template": Target(_template, (CHATML.encode(), _TOOLS_TEMPLATE.encode()), exit_codes=(_CONFIGURATION, _DATASET)),
}
