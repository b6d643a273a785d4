"""An environment and a workspace that were made to do harm, around the real `prepare` command.

A pod's environment is the administrator's: its addresses decide, and other settings of libraries (proxies, logins,
services that give the node's credentials) get and give nothing. Files in data, models and the workspace are the
tenant's, and are never run or followed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import close_session

from qlora_api.contract import ExitCode
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.endpoints import server_address
from tests.support.commands.command import new_files
from tests.support.failures import failing
from tests.support.fake_hub import FakeHub, serve
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.rejected.made import Place, write_code
from tests.support.runs.hostile import contents
from tests.trainer.conftest import MakeContext

PASSWORD = "canary-password"
# Modules that Python, the trainer and its libraries import by name.
OURS, OTHERS = ("qlora_trainer", "qlora_api"), ("sitecustomize", "usercustomize", "json", "torch", "numpy")
MODULES = tuple(f"{name}.py" for name in OURS + OTHERS)


def _endless(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("home", "temporary"), [(Path.touch, _endless), pytest.param(_endless, Path.touch, marks=pytest.mark.slow)]
)
def test_files_of_tenants_are_not_run_and_invalid_folders_are_ignored(
    tmp_path: Path, tiny_llama: Path, home: Callable[[Path], None], temporary: Callable[[Path], None]
) -> None:
    """The image's Python does not import from its working directory, which is the data's."""
    place = Place(tmp_path)
    place.outside.mkdir()
    shutil.copytree(tiny_llama, place.model)
    files = new_files(tmp_path / "job", tmp_path / "models")
    modules = (*MODULES, "transformers_modules/__init__.py", "transformers_modules/model/__init__.py")
    for folder in (place.model, files.data):
        write_code(place.canary, *(folder / name for name in modules))
    home(place.outside / "home")
    temporary(place.outside / "temporary")
    before = contents(place.outside)
    folders = {"HOME": place.outside / "home", "TMPDIR": place.outside / "temporary", "HF_MODULES_CACHE": place.model}
    environment = {name: str(path) for name, path in folders.items()}
    done = files.run("prepare", ("env", f"--chdir={files.data}"), PYTHONSAFEPATH="1", **environment)
    assert done.exit_code == ExitCode.DONE, done.result.message
    assert contents(place.outside) == before


def test_qlora_run_imports_nothing_from_its_working_directory(tmp_path: Path, tiny_llama: Path) -> None:
    """It may hold any data. The program's own location gives its identity."""
    files = new_files(tmp_path / "job", tiny_llama.parent)
    write_code(tmp_path / "canary", *(files.data / name for name in MODULES))
    missing = files.with_spec({"model": {"source": "pvc://models/none"}})
    (tmp_path / "job.yaml").write_text(json.dumps({**missing.document, "metadata": {"name": "tiny"}}))
    volumes = ("--volume", f"models={files.models}", "--volume", f"data={files.data}")
    options = ("--workspace", str(files.workspace), *volumes, "--device", "cpu")
    done = subprocess.run(
        [Path(sys.executable).with_name("qlora"), "run", str(tmp_path / "job.yaml"), *options],
        cwd=files.data,
        env={key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.MODEL_UNAVAILABLE, done.stdout + done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("source", "variable"),
    [
        ("hf://org/tiny", "HF_ENDPOINT"),
        ("s3://team/tiny", "AWS_ENDPOINT_URL"),
        ("oci://{address}/team/tiny:v1", "QLORA_REGISTRIES"),
    ],
)
def test_only_the_named_server_gets_requests_with_the_secrets_login_only(
    tmp_path: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, source: str, variable: str
) -> None:
    """Logins of .netrc, a node's credentials and proxies are not the tenant's to use."""
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    (tmp_path / ".netrc").write_text(f"default login team password {PASSWORD}\n")
    with serve(FakeHub()) as server, serve(FakeHub()) as elsewhere:
        trap = {
            "NETRC": str(tmp_path / ".netrc"),
            "HOME": str(tmp_path),
            "AWS_METADATA_ENDPOINT": elsewhere.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": elsewhere.endpoint,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{elsewhere.endpoint}/credentials",
        }
        if variable != "HF_ENDPOINT":  # the hub may lie behind a proxy
            proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROXY_URL")
            trap |= dict.fromkeys(proxies, elsewhere.endpoint)
        for name, value in (trap | {variable: server.endpoint}).items():
            monkeypatch.setenv(name, value)
        # The client keeps its connections, which have the environment of the first one.
        close_session()
        address = source.format(address=server.endpoint.removeprefix("http://"))
        context = replace(make_context({"model": {"source": address}}), registries=(server.endpoint,))
        with failing(ExitCode.MODEL_UNAVAILABLE):
            prepare(context, Recorded())
        close_session()
    assert server.requests
    assert server.tokens == {""}
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("source", "variable"), [("hf://org/tiny", "HF_ENDPOINT"), ("s3://team/tiny", "AWS_ENDPOINT_URL")]
)
def test_an_invalid_address_is_rejected_before_any_request(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, source: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://team:{PASSWORD}@127.0.0.1:1")
    words = (f"the address of a server in {variable} ", "has credentials in it")
    with failing(ExitCode.BAD_CONFIGURATION, *words) as failure:
        prepare(make_context({"model": {"source": source}}), Recorded())
    assert PASSWORD not in failure.value.message


def test_addresses_of_servers_are_used_unchanged() -> None:
    addresses = {"A": "https://minio.team.svc:9000", "B": "http://[::1]:80/path", "C": ""}
    assert [server_address(addresses, name) for name in "ABCD"] == [addresses["A"], addresses["B"], None, None]


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    """A process that may write to the volume can put it there before the step."""
    log = tmp_path / "records" / "prepare.log"
    log.parent.mkdir()
    log.symlink_to(tmp_path / "not-there")
    program = (
        "import pathlib, sys; from qlora_trainer.core import process; process.log_to(pathlib.Path(sys.argv[1]), 'a')"
    )
    subprocess.run([sys.executable, "-c", program, str(log)], check=True)
    assert log.read_text() == "a\n"
    assert not log.is_symlink()
    assert not (tmp_path / "not-there").exists()
