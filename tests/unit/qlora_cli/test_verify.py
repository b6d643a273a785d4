"""`qlora verify`: what it finds in a folder, and its choice among the statements about an artifact."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qlora_api.contract import ExitCode
from qlora_api.lineage import SIGNED_FILE, UNSIGNED_FILE
from qlora_cli import verification
from qlora_cli.__main__ import main
from qlora_cli.verification import Adapter, NotVerified, verify
from tests.support.signed_adapter import KEY, WEIGHTS, WEIGHTS_FILE, digest, public_pem, signed_statement

ADDRESS = "oci://registry.example.org/team/adapter:v1"
OWN, OTHER = "a" * 64, "b" * 64
FILE = WEIGHTS_FILE


def bundle(artifact: str, content: bytes = WEIGHTS) -> bytes:
    """Sign a statement about the artifact with this SHA-256, and about this content."""
    return signed_statement({FILE: digest(content), ADDRESS: artifact}, job=f"of-{artifact[0]}")


def public_key(file: Path, key: Ed25519PrivateKey) -> Path:
    file.write_bytes(public_pem(key))
    return file


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return public_key(tmp_path / "signing.pub", KEY)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a signed adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / FILE).write_bytes(WEIGHTS)
    (folder / SIGNED_FILE).write_bytes(bundle(OWN))
    return folder


def run(adapter: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(adapter), *options])


def rejection(result: Result) -> str:
    """Why an adapter does not verify."""
    assert result.exit_code == ExitCode.UNSAFE_ARTIFACT, result.output
    return result.output.strip().removeprefix("Error: not verified: ").removeprefix("the lineage does not verify: ")


def payload(adapter: Path) -> tuple[dict[str, dict[str, str]], bytes]:
    """The bundle, and the statement that it signs."""
    found = json.loads((adapter / SIGNED_FILE).read_bytes())
    return found, base64.b64decode(found["dsseEnvelope"]["payload"])


def test_a_signed_adapter_verifies_with_its_key(adapter: Path, key: Path) -> None:
    # Neither is part of what was published.
    (adapter / ".cache").mkdir()
    (adapter / UNSIGNED_FILE).write_text("anything")
    done = run(adapter, "--key", str(key))
    assert done.exit_code == 0, done.output
    assert "Signature: of the given key" in done.output
    assert "Files:     1, each with the SHA-256 that is stated" in done.output


def linked(adapter: Path) -> None:
    """The weights are a link out of the folder, to an equal file."""
    (adapter / FILE).rename(adapter.parent / "elsewhere")
    (adapter / FILE).symlink_to(adapter.parent / "elsewhere")


def forged(adapter: Path) -> None:
    """The statement names another base."""
    found, stated = payload(adapter)
    found["dsseEnvelope"]["payload"] = base64.b64encode(stated.replace(b"org/model", b"org/other")).decode()
    (adapter / SIGNED_FILE).write_text(json.dumps(found))


def linked_statement(adapter: Path) -> None:
    (adapter / SIGNED_FILE).rename(adapter.parent / "elsewhere")
    (adapter / SIGNED_FILE).symlink_to(adapter.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda adapter: (adapter / "adapter_model.bin").touch(), "state adapter_model.bin: it was added afterwards"),
        (lambda adapter: (adapter / FILE).unlink(), f"{FILE} is missing"),
        (lambda adapter: (adapter / FILE).write_bytes(b"others"), f"{FILE} has SHA-256 "),
        (linked, f"{FILE} is not a file"),
        (forged, "no signature is of this key, or the statement was changed afterwards"),
        (linked_statement, f"has no signed lineage ({SIGNED_FILE})"),
    ],
    ids=["added", "missing", "changed", "linked", "forged", "linked statement"],
)
def test_a_signed_adapter_that_was_changed_does_not_verify(
    adapter: Path, key: Path, change: Callable[[Path], object], why: str
) -> None:
    change(adapter)
    assert why in rejection(run(adapter, "--key", str(key)))


def test_a_signature_of_another_key_does_not_verify(adapter: Path, tmp_path: Path) -> None:
    other = public_key(tmp_path / "other.pub", Ed25519PrivateKey.generate())
    assert "no signature is of this key" in rejection(run(adapter, "--key", str(other)))


def test_without_a_key_no_signature_is_checked_and_the_output_shows_that(adapter: Path) -> None:
    forged(adapter)
    done = run(adapter)
    assert done.exit_code == 0, done.output
    assert "Signature: not checked, so any user may have written this" in done.output
    assert "hf://org/other" in done.output


def test_an_unsigned_adapter_verifies_without_a_key_only(adapter: Path, key: Path) -> None:
    (adapter / UNSIGNED_FILE).write_bytes(payload(adapter)[1])
    (adapter / SIGNED_FILE).unlink()
    done = run(adapter)
    assert done.exit_code == 0, done.output
    assert "Signature: not checked" in done.output
    assert f"has no signed lineage ({SIGNED_FILE})" in rejection(run(adapter, "--key", str(key)))
    (adapter / UNSIGNED_FILE).unlink()
    assert f"has no lineage ({SIGNED_FILE} or {UNSIGNED_FILE})" in rejection(run(adapter))


def attach(monkeypatch: pytest.MonkeyPatch, *bundles: bytes, looked_at: int | None = None) -> None:
    """Let the artifact at ADDRESS have these statements, in this order."""

    def downloaded(_address: str, folder: Path) -> Adapter:
        (folder / FILE).write_bytes(WEIGHTS)
        return Adapter(folder, bundles, (), OWN, looked_at)

    monkeypatch.setattr(verification, "download", downloaded)


def test_statements_of_the_same_key_about_other_artifacts_hide_none(monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    attach(monkeypatch, bundle(OTHER, b"others"), bundle(OWN))
    found = verify(ADDRESS, key)
    assert (found.lineage.job.name, found.by_key) == ("of-a", True)


def test_statements_about_other_artifacts_only_verify_nothing(monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    attach(monkeypatch, bundle(OTHER))
    with pytest.raises(NotVerified, match=f"about another artifact than sha256:{OWN}$"):
        verify(ADDRESS, key)
    attach(monkeypatch, bundle(OTHER), looked_at=1)
    with pytest.raises(NotVerified, match=r"about another artifact .*; only the first 1 of what is attached"):
        verify(ADDRESS, key)
