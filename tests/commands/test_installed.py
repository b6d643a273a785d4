"""Each command with the extras on its page, and its message without them."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from tests.support.commands.installed import install, python, qlora

JOB = """apiVersion: qlora.dev/v1beta1
kind: QLoRAJob
metadata: {name: job}
spec:
  model: {source: hf://org/model}
  dataset: {source: hf://org/rows}
  output: {destination: hf://org/adapter}
"""
NO_LINEAGE = "Error: not verified: adapter has no lineage (lineage.sigstore.json or lineage.intoto.json)\n"
NO_KUBECONFIG = "Error: no kubeconfig can be read"


def lacks(command: str, library: str, extras: str) -> str:
    return (
        f"Error: `{command}` takes the library {library}, which is not installed: run `pip install '.[{extras}]'` in a "
        "checkout of the repository\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("installed")
    (made / "adapter").mkdir()
    (made / "job.yaml").write_text(JOB)
    return made


@pytest.fixture(scope="module")
def documented(folder: Path) -> Path:
    """As docs/how-to/command-line.md installs it."""
    return install(("cli", "client"), folder / "documented")


@pytest.fixture(scope="module")
def with_stores(folder: Path) -> Path:
    """With the extra for hubs, buckets and registries too, and without the trainer."""
    return install(("cli", "client", "stores"), folder / "stores")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("verify adapter", NO_LINEAGE),
        ("verify hf://org/adapter", lacks("verify", "huggingface_hub", "cli,stores")),
        ("plan job.yaml", lacks("plan", "safetensors", "cli,trainer")),
        ("list", NO_KUBECONFIG),
        ("adapter job", NO_KUBECONFIG),
    ],
)
def test_the_documented_installation_has_each_command_or_names_the_extra(
    documented: Path, arguments: str, said: str
) -> None:
    assert qlora(documented, *arguments.split()).stderr.startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("verify pvc://claim/adapter", "Error: pvc://claim/adapter cannot be read from here: copy the folder"),
        ("data job.yaml --tokenizer adapter", "Error: the trainer is not installed: run `pip install"),
        ("run job.yaml --workspace work", "Error: the trainer is not installed: run `pip install"),
    ],
)
def test_an_installation_without_the_trainer_names_the_extra(with_stores: Path, arguments: str, said: str) -> None:
    assert qlora(with_stores, *arguments.split()).stderr.startswith(said)


def test_the_extra_stores_reads_adapters_from_hubs_buckets_and_registries(with_stores: Path) -> None:
    said = python(with_stores, "import qlora_client.files.stores, qlora_trainer.model.source.downloads")
    assert said.returncode == 0, said.stderr


def test_the_advice_for_a_missing_library_uses_no_public_index(documented: Path) -> None:
    said = python(
        documented,
        "from qlora_client.kube.errors import ClusterError\n"
        "from qlora_client.files.folders import open_folder\n"
        "try:\n"
        "    open_folder(None, None, 'hf://org/adapter', print).__enter__()\n"
        "except ClusterError as error:\n"
        "    print(error)\n",
    )
    assert "`pip install '.[client,stores]'` in a checkout of the repository\n" in said.stdout, said.stderr


def test_verify_needs_no_client_of_a_cluster(folder: Path) -> None:
    bare = install(("cli",), folder / "bare")
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "signing.pub").write_bytes(pem)
    assert qlora(bare, "verify", "adapter").stderr == NO_LINEAGE
    signed = qlora(bare, "verify", "adapter", "--key", "signing.pub")
    assert signed.stderr.startswith("Error: not verified: adapter has no signed lineage"), signed.stderr
    assert qlora(bare, "list").stderr == lacks("list", "kubernetes", "cli,client")
