"""Lineage of a published adapter: stated and signed; tests/unit/qlora_cli/test_verify.py has its verification."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from devcluster import toolchain
from devcluster.layout import from_environment
from qlora_api.artifact_status import GateStatus, InitialAdapterStatus
from qlora_api.contract import ENV_IMAGE, ExitCode
from qlora_api.schema import replace
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_cli.__main__ import main
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.publishing.lineage import lineage_file
from qlora_trainer.publishing.signing import PrivateKey
from qlora_trainer.stores.contents import PublishedFile
from tests.support import training
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID
from tests.support.resolved import resolved_spec
from tests.support.runs.published import MANIFEST, published
from tests.support.servers import registry
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy

IMAGE = f"registry.example.org/qlora-trainer@sha256:{'5' * 64}"


def write_key(folder: Path, key: PrivateKey) -> tuple[Path, Path]:
    """Files of the key and of its public part."""
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path, generate_private_key(SECP256R1()))


def verify(adapter: Path | str, key: Path | None = None) -> Result:
    return CliRunner().invoke(main, ["verify", str(adapter), *(["--key", str(key)] if key else [])])


def statement(bundle: Path) -> Any:
    return json.loads(base64.b64decode(json.loads(bundle.read_text())["dsseEnvelope"]["payload"]))


def test_every_field_of_the_statement_is_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of step 4, the best, of 6, with a gate, an initial adapter and a continued run."""
    monkeypatch.setenv(ENV_IMAGE, IMAGE)
    initial = {"source": "hf://acme/earlier@c0ffee", "sha256": "a" * 64}
    gate = {"passed": True, "adapterSha256": "b" * 64, "evalLoss": 1.25, "scoreRows": 3}
    prepared = PrepareRecord(
        model_path="model",
        model_revision="sha256:revision",
        base_path="base",
        base_sha256="sha of prepare",
        data_path="data/rows",
        fingerprint="of the data",
        target_modules=("q_proj",),
        packed=True,
        model_type="llama",
        memory=MemoryStatus(estimate_bytes=1, low_bytes=1, high_bytes=1, verdict="unknown"),
        dataset=DatasetStatus(format="text", rows=20, used_rows=11, eval_rows=5, sha256="c" * 64),
        initial_adapter=InitialAdapterStatus.model_validate(initial),
    )
    trained = TrainRecord(
        fingerprint="of the adapter",
        adapter_path="trained",
        adapter_sha256="b" * 64,
        attempts=2,
        training_step=6,
        total_steps=9,
        adapter_step=4,
        base_sha256="d" * 64,
        loss=1.5,
        initial_eval_loss=2.5,
        eval_loss=1.25,
    )
    held_out = {"source": "hf://a/held-out", "fraction": None}
    spec = resolved_spec(training.job({"continues": "earlier", "dataset": {"eval": held_out}}).spec)
    made = TrainedJob("tiny", JOB_UID, spec, "", prepared, trained, GateStatus.model_validate(gate))
    files = {"adapter.bin": PublishedFile(sha256="e" * 64, size=4)}
    manifest = replace(MANIFEST, files=files, libraries={"torch": "2.9"})

    stated = json.loads(lineage_file(made, manifest, "team", None, {"oci://r/a:v1": "f" * 64}).content)

    assert stated["subject"] == [
        {"name": "adapter.bin", "digest": {"sha256": "e" * 64}},
        {"name": "oci://r/a:v1", "digest": {"sha256": "f" * 64}},
    ]
    settings = stated["predicate"].pop("settings")
    assert settings == {name: getattr(spec, name).dump() for name in ("quantization", "lora", "training")}
    assert (settings["lora"]["rank"], settings["training"]["optimizer"]) == (4, "paged_adamw_32bit")
    assert stated["predicate"] == {
        "job": {"name": "tiny", "namespace": "team", "uid": JOB_UID},
        "base": {"source": "pvc://models/tiny", "revision": "sha256:revision", "sha256": "d" * 64},
        "initialAdapter": initial,
        "continues": "earlier",
        "data": {
            "sources": ["pvc://data/rows.jsonl", "hf://a/held-out"],
            "sha256": "c" * 64,
            "prepared": "of the data",
            "rows": 11,
            "evalRows": 5,
        },
        "trainer": {"image": IMAGE, "digest": f"sha256:{'5' * 64}", "libraries": {"torch": "2.9"}},
        "fingerprint": "of the adapter",
        "specSha256": MANIFEST.spec_sha256,
        "result": {
            "steps": 6,
            "adapterStep": 4,
            "attempts": 2,
            "loss": 1.5,
            "initialEvalLoss": 2.5,
            "evalLoss": 1.25,
            "gate": {**gate, "criteria": []},
        },
    }


def test_a_signed_adapter_verifies_with_its_key(
    trained: Files, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_IMAGE, IMAGE)
    private, public = keys
    unsigned = published(trained)
    assert verify(trained.workspace / "adapter").exit_code == 0
    # The profile gets a key, and the job is retried: that it has published without one is not enough.
    record = published(trained, mounts=Mounts(signing_key=private))
    assert (unsigned.adapter.lineage, record.adapter.lineage) == ("unsigned", "signed")
    folder = trained.workspace / "adapter"

    done = verify(folder, public)
    assert done.exit_code == 0, done.output
    assert "of the given key" in done.output
    stated = statement(folder / "lineage.sigstore.json")
    assert {entry["name"]: entry["digest"]["sha256"] for entry in stated["subject"]}[
        "adapter_model.safetensors"
    ] == record.adapter.sha256
    assert stated["predicate"]["job"] == {"name": "tiny", "namespace": "default", "uid": JOB_UID}


def rejection(result: Result) -> str:
    """Why an adapter does not verify."""
    assert result.exit_code == ExitCode.UNSAFE_ARTIFACT, result.output
    return result.output.strip().removeprefix("Error: not verified: ").removeprefix("the lineage does not verify: ")


def test_an_unusable_key_is_named_and_nothing_is_published(trained: Files, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n…\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n")
    with pytest.raises(StepFailure, match=r"signingKey.*not encrypted") as failure:
        published(trained, mounts=Mounts(signing_key=key))
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert not (trained.workspace / "adapter").exists()


def test_an_unusable_key_is_rejected_before_any_request_to_a_registry(trained: Files, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("no key")
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404))) as server:
        job = trained.with_spec({"output": {"destination": f"oci://{server.address}/team/adapter:v1"}})
        with pytest.raises(StepFailure, match="signingKey"):
            published(job, registries=(f"http://{server.address}",), mounts=Mounts(signing_key=key))
        assert not [request for request in server.seen if request.method != "GET"]


def test_the_statement_about_an_artifact_is_attached_to_it_once(
    trained: Files, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    with registry(tmp_path / "registry") as host:
        job = trained.with_spec({"output": {"destination": f"oci://{host}/team/adapter:v1"}})
        record = published(job, registries=(f"http://{host}",), mounts=Mounts(signing_key=private))
        (job.workspace / "records" / "publish.json").unlink()
        assert (
            published(job, registries=(f"http://{host}",), mounts=Mounts(signing_key=private)).adapter == record.adapter
        )

        done = verify(record.adapter.uri, public)
        assert done.exit_code == 0, done.output
        assert "of the given key" in done.output
        [*_, index] = (tmp_path / "registry").rglob("_manifests/tags/sha256-*/current/link")
        content = (tmp_path / "registry").rglob(f"{index.read_text().removeprefix('sha256:')}/data")
        [entry] = json.loads(next(content).read_text())["manifests"]
        assert entry["annotations"]["dev.sigstore.bundle.predicateType"] == "https://qlora.dev/lineage/v1"


def test_a_statement_beyond_the_read_limit_is_not_reported_as_missing(
    trained: Files, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """A user who may push can attach so much that the statement is not reached."""

    def crowded(request: Request) -> Fault | None:
        path, _, query = request.path.partition("?")
        if "/referrers/" not in path:
            return None
        number = int(query.partition("page=")[2] or 0)
        index = {"schemaVersion": 2, "manifests": [{"artifactType": "application/x"}] * 3}
        return Fault(200, headers={"Link": f"<{path}?page={number + 1}>; rel=next"}, body=json.dumps(index).encode())

    private, public = keys
    with registry(tmp_path / "registry") as host, serve_proxy(FaultProxy(host, rule=crowded)) as proxy:
        job = trained.with_spec({"output": {"destination": f"oci://{host}/team/adapter:v1"}})
        published(job, registries=(f"http://{host}",), mounts=Mounts(signing_key=private))
        for key in (public, None):
            found = verify(f"oci://{proxy.address}/team/adapter:v1", key)
            assert "only the first 60 of what is attached to the artifact were looked at" in rejection(found)


@pytest.mark.slow
def test_cosign_verifies_statements_next_to_files_and_attached_to_artifacts(
    trained: Files, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    cosign = str(toolchain.built(from_environment(), ["cosign"])["cosign"])
    with_key = ["--key", str(public), "--insecure-ignore-tlog", "--type", "https://qlora.dev/lineage/v1"]
    published(trained, mounts=Mounts(signing_key=private))
    folder = trained.workspace / "adapter"
    beside = ["--bundle", str(folder / "lineage.sigstore.json"), str(folder / "adapter_model.safetensors")]
    subprocess.run([cosign, "verify-blob-attestation", *with_key, *beside], check=True, capture_output=True)
    with registry(tmp_path / "registry") as host:
        job = trained.with_spec({"output": {"destination": f"oci://{host}/team/adapter:v1"}})
        published(job, registries=(f"http://{host}",), mounts=Mounts(signing_key=private))
        command = [cosign, "verify-attestation", *with_key, f"{host}/team/adapter:v1"]
        subprocess.run(command, check=True, capture_output=True)
