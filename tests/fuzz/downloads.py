"""The parsers of data from a pod or a store for a user who downloads an adapter."""

import io
import shutil
import tarfile
from pathlib import Path

from qlora_client.files.archive import UnsafeArchiveError, extract
from qlora_client.files.published import DamagedError, parse_manifest
from qlora_client.history import of_metrics
from qlora_client.kube.channels import CommandError, standard_output
from tests.fuzz.target import Target

_NAME, _MOST = "README.md", 4096


def _archive(content: bytes, folder: Path) -> None:
    """Check that any archive creates only the requested file, within the size limit."""
    target = folder / "extracted"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    before = set(folder.iterdir())
    try:
        extract(iter([content[:700], content[700:]]), {_NAME: _MOST}, target)
    finally:
        assert set(folder.iterdir()) == before
        assert all(path.name == _NAME and not path.is_symlink() for path in target.iterdir())
        assert all(path.stat().st_size <= _MOST for path in target.iterdir())


def _tar() -> bytes:
    info, stream = tarfile.TarInfo(_NAME), io.BytesIO()
    info.size = 6
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"# card"))
    return stream.getvalue()[:2048]


def _manifest(content: bytes, _folder: Path) -> None:
    for name, file in parse_manifest(content, "pvc://claim/adapter").items():
        assert "/" not in name
        assert not name.startswith(".")
        assert file.size >= 0


class _Connection:
    """A connection with these bytes as one message, and then its end."""

    def __init__(self, content: bytes) -> None:
        self._messages = iter([(2, content), (8, b"")])

    def recv_data(self, control_frame: bool) -> tuple[int, bytes]:
        return next(self._messages)

    def settimeout(self, timeout: float) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


_FILES = b'{"files": {"README.md": {"sha256": "' + b"a" * 64 + b'", "size": 6}}}'
_METRICS = b'{"step": 0, "evalLoss": 2.5}\n{"step": 1, "loss": 2.25}\n'

DOWNLOADS = {
    "archive": Target(_archive, (_tar(),), (UnsafeArchiveError,)),
    "published": Target(_manifest, (_FILES,), (DamagedError,)),
    "metrics": Target(lambda content, _: of_metrics(content), (_METRICS,), (ValueError,)),
    "channels": Target(
        lambda content, _: list(standard_output(_Connection(content))), (b'\x03{"status": "Success"}',), (CommandError,)
    ),
}
