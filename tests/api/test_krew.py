"""The kubectl plugin as krew installs it: its manifest is valid, each archive installs, and kubectl finds it."""

import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest

from devcluster import toolchain
from devcluster.layout import from_environment
from krew import plugin
from qlora_cli.__main__ import main

ROOT = Path(__file__).parents[2]
JOB = """apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: job}
spec:
  model: {source: hf://org/model}
  dataset: {source: hf://org/rows}
  output: {destination: hf://org/adapter}
"""
# What the program says of a call, without a cluster, a network or PyTorch.
CALLS = {
    "list --kubeconfig=/nowhere": "Error: no kubeconfig can be read",
    "watch job --kubeconfig=/nowhere": "Error: no kubeconfig can be read",
    "verify {folder}/adapter": "Error: not verified: ",
    "verify pvc://claim/adapter": "Error: pvc://claim/adapter cannot be read from here",
    "data {folder}/job.yaml": "Error: the trainer is not installed: run `pip install",
    "run {folder}/job.yaml --workspace {folder}/work": "Error: the trainer is not installed: run `pip install",
}


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which it is published."""
    folder = tmp_path / "published"
    folder.mkdir()
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def environment(home: Path) -> dict[str, str]:
    """With kubectl and krew in PATH, and krew's folder below `home`."""
    tools = home / "tools"
    tools.mkdir(exist_ok=True)
    for name, program in toolchain.built(from_environment(), ["kubectl", "kubectl-krew"]).items():
        shutil.copy(program, tools / name)
    paths = (str(home / "krew" / "bin"), str(tools), os.environ["PATH"])
    return {**os.environ, "HOME": str(home), "KREW_ROOT": str(home / "krew"), "PATH": os.pathsep.join(paths)}


def run(home: Path, *command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def validate(home: Path, manifest: Path) -> "subprocess.CompletedProcess[str]":
    """Krew's own validation, which installs each archive from where the manifest says that it is."""
    [validator] = toolchain.built(from_environment(), ["validate-krew-manifest"]).values()
    return run(home, validator, "-manifest", manifest)


def archives(folder: Path) -> list[Path]:
    """Archives of three platforms, whose program is a script."""
    program = folder.parent / "program"
    program.mkdir()
    made = []
    for system, architecture in (("linux", "amd64"), ("darwin", "arm64"), ("windows", "amd64")):
        archive = plugin.Archive("v0.1.0", system, architecture)
        (program / archive.program).write_text("#!/bin/sh\necho installed by krew\n")
        (program / archive.program).chmod(0o755)
        plugin.pack(program, folder / archive.name)
        made.append(folder / archive.name)
    return made


def test_krew_accepts_the_manifest_and_installs_each_archive(published: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = published
    manifest = plugin.write_manifest(archives(folder), address, tmp_path)
    said = validate(tmp_path, manifest)
    assert said.returncode == 0, said.stderr
    assert "all 3 spec.platforms installed fine" in said.stderr
    installed = run(tmp_path, "kubectl", "krew", "install", f"--manifest={manifest}")
    assert installed.returncode == 0, installed.stderr
    assert run(tmp_path, "kubectl", "qlora").stdout == "installed by krew\n"


def test_krew_notices_an_archive_that_has_changed(published: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = published
    manifest = plugin.write_manifest(archives(folder), address, tmp_path)
    for archive in folder.iterdir():
        with tarfile.open(archive, "w:gz") as changed:
            changed.add(ROOT / "README.md", plugin.PROGRAM)
    said = validate(tmp_path, manifest)
    assert said.returncode != 0
    assert "checksum does not match" in said.stderr


@pytest.mark.parametrize("names", [[], ["kubectl-qlora-v1-linux-amd64.tar.gz", "kubectl-qlora-v2-linux-arm64.tar.gz"]])
def test_a_manifest_is_of_one_version(names: list[str], tmp_path: Path) -> None:
    files = [tmp_path / name for name in names]
    for file in files:
        file.touch()
    with pytest.raises(ValueError, match="must be of one version"):
        plugin.write_manifest(files, "https://example.org", tmp_path)
    (tmp_path / "other.tar.gz").touch()
    with pytest.raises(ValueError, match="must be named kubectl-qlora-vVERSION"):
        plugin.write_manifest([tmp_path / "other.tar.gz"], "https://example.org", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_archive_runs_without_any_python(tmp_path: Path) -> None:
    """Five minutes on a busy machine: PyInstaller reads every module."""
    command = ["make", "plugin", f"DIST={tmp_path}", "ADDRESS=https://example.org"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
    [archive] = tmp_path.glob("*.tar.gz")
    files = (f"--manifest={tmp_path / 'qlora.yaml'}", f"--archive={archive}")
    installed = run(tmp_path, "kubectl", "krew", "install", *files)
    assert installed.returncode == 0, installed.stderr
    assert run(tmp_path, "kubectl", "qlora", "--version").stdout.startswith("kubectl qlora, version ")
    for name in main.list_commands(click.Context(main)):
        said = run(tmp_path, "kubectl", "qlora", name, "--help")
        assert (said.returncode, said.stderr) == (0, ""), name
    (tmp_path / "adapter").mkdir()
    (tmp_path / "job.yaml").write_text(JOB)
    for call, expected in CALLS.items():
        said = run(tmp_path, "kubectl", "qlora", *call.format(folder=tmp_path).split())
        assert said.stderr.startswith(expected), (call, said.stderr)
    [environment] = (from_environment().cache / "plugin-venv").glob("lib/python3.*/site-packages")
    for package in ("cli/qlora_cli", "cli/qlora_client", "trainer_image/qlora_trainer"):
        for file in (ROOT / package).rglob("*.py"):
            packed = environment / file.relative_to((ROOT / package).parent)
            assert packed.read_text() == file.read_text(), f"{packed} is stale"
