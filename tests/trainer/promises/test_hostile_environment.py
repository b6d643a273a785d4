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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.endpoints import server_address
from tests.support.commands.command import Done, Files, new_files
from tests.support.failures import failing
from tests.support.fake_hub import FakeHub, serve
from tests.support.models.tiny import Recorded
from tests.support.runs.hostile import Place, contents
from tests.trainer.conftest import MakeContext

PASSWORD = "canary-password"
# Modules that Python, the trainer and its libraries import by name.
OURS, OTHERS = ("qlora_trainer", "qlora_api"), ("sitecustomize", "usercustomize", "json", "torch", "numpy")
MODULES = tuple(f"{name}.py" for name in OURS + OTHERS)


@pytest.fixture
def files(tmp_path: Path, tiny_llama: Path) -> Files:
    """A job that nothing is wrong with."""
    return new_files(tmp_path / "job", tiny_llama.parent)


@pytest.fixture
def elsewhere() -> Iterator[FakeHub]:
    """A server that must get no request."""
    with serve(FakeHub()) as server:
        yield server


def prepared(files: Files, folder: Path, **environment: str) -> Done:
    """Run in that folder with the image's Python, which does not import from it."""
    return files.run("prepare", ("env", f"--chdir={folder}"), PYTHONSAFEPATH="1", **environment)


def test_code_next_to_the_model_and_the_data_is_not_run(tmp_path: Path, tiny_llama: Path) -> None:
    place = Place(tmp_path)
    place.outside.mkdir()
    shutil.copytree(tiny_llama, place.model)
    files = new_files(tmp_path / "job", tmp_path / "models")
    for folder in (place.model, files.data):
        place.code(folder, *MODULES, "transformers_modules/__init__.py", "transformers_modules/model/__init__.py")
    done = prepared(files, files.data, HF_MODULES_CACHE=str(place.model))
    assert done.exit_code == ExitCode.DONE, done.result.message
    assert not place.canary.exists()


def test_qlora_run_imports_nothing_from_its_working_directory(tmp_path: Path, files: Files) -> None:
    """It may hold any data. The program's own location gives its identity."""
    place = Place(tmp_path)
    place.outside.mkdir()
    place.code(files.data, *MODULES)
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
    assert not place.canary.exists()


@pytest.mark.parametrize(
    ("source", "variable"),
    [
        ("hf://org/tiny", "HF_ENDPOINT"),
        ("s3://team/tiny", "AWS_ENDPOINT_URL"),
        ("oci://{address}/team/tiny:v1", "QLORA_REGISTRIES"),
    ],
)
def test_only_the_named_server_gets_requests_with_the_secrets_login_only(
    tmp_path: Path, files: Files, elsewhere: FakeHub, source: str, variable: str
) -> None:
    """Logins of .netrc, a node's credentials and proxies are not the tenant's to use."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"default login team password {PASSWORD}\n")
    trap = {
        "NETRC": str(tmp_path / "home" / ".netrc"),
        "HOME": str(tmp_path / "home"),
        "AWS_METADATA_ENDPOINT": elsewhere.endpoint,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": elsewhere.endpoint,
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{elsewhere.endpoint}/credentials",
    }
    if variable != "HF_ENDPOINT":  # the hub may lie behind a proxy
        proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROXY_URL")
        trap |= dict.fromkeys(proxies, elsewhere.endpoint)
    with serve(FakeHub()) as server:
        address = server.endpoint.removeprefix("http://")
        changed = files.with_spec({"model": {"source": source.format(address=address)}})
        done = prepared(changed, tmp_path, **trap, **{variable: server.endpoint})
    assert done.exit_code == ExitCode.MODEL_UNAVAILABLE, done.result.message
    assert server.requests
    assert server.tokens == {""}
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("source", "variable"), [("hf://org/tiny", "HF_ENDPOINT"), ("s3://team/tiny", "AWS_ENDPOINT_URL")]
)
@pytest.mark.parametrize(
    ("address", "says"),
    [
        (f"http://team:{PASSWORD}@127.0.0.1:1", "has credentials in it"),
        (f"http://{PASSWORD}@127.0.0.1:1", "has credentials in it"),
        ("file:///etc", "begins with 'file'"),
        ("127.0.0.1:1", "begins with '127.0.0.1'"),
        ("http://127.0.0.1:port", "is not an address"),
        ("http://", "has no host"),
    ],
)
def test_an_invalid_address_is_rejected_before_any_request(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, source: str, variable: str, address: str, says: str
) -> None:
    monkeypatch.setenv(variable, address)
    with failing(ExitCode.BAD_CONFIGURATION, f"the address of a server in {variable} ", says) as failure:
        prepare(make_context({"model": {"source": source}}), Recorded())
    assert PASSWORD not in failure.value.message


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2:80",
        "2852039166",
        "0xa9fea9fe",
        "100.100.100.200",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2:0::254]",
        "[fe80::1]",
        "Metadata.google.internal.",
        "metadata",
    ],
)
def test_the_nodes_credential_service_is_not_allowed_as_a_server(host: str) -> None:
    """Not by way of prepare: nothing may be sent there, not even by a broken test."""
    with failing(ExitCode.BAD_CONFIGURATION, match="the metadata service of a cloud"):
        server_address({"AWS_ENDPOINT_URL": f"http://{host}/latest"}, "AWS_ENDPOINT_URL")


def test_addresses_of_servers_are_used_unchanged() -> None:
    addresses = {"A": "https://minio.team.svc:9000", "B": "http://[::1]:80/path", "C": ""}
    assert [server_address(addresses, name) for name in "ABCD"] == [addresses["A"], addresses["B"], None, None]


def _file(path: Path) -> None:
    path.write_text("not a folder")


def _endless_link(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_file, _endless_link])
def test_invalid_home_and_temporary_folders_are_ignored(
    tmp_path: Path, files: Files, make: Callable[[Path], None]
) -> None:
    (tmp_path / "outside").mkdir()
    places = {"HOME": tmp_path / "outside" / "home", "TMPDIR": tmp_path / "outside" / "temporary"}
    for path in places.values():
        make(path)
    before = contents(tmp_path / "outside")
    done = prepared(files, tmp_path, **{name: str(path) for name, path in places.items()})
    assert done.exit_code == ExitCode.DONE, done.result.message
    assert contents(tmp_path / "outside") == before


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
