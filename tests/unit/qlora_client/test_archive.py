"""Files come out of an archive only if they are requested and plain."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_client.files.archive import UnsafeArchiveError, extract

WANTED = {"adapter_model.safetensors": 100, "README.md": 10}


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as written:
        for info, content in members:
            written.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def blocks(content: bytes, size: int = 700) -> Iterator[bytes]:
    yield from (content[start : start + size] for start in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 511, 700, 2**20])
def test_files_arrive_with_their_sums_however_the_stream_is_cut(tmp_path: Path, size: int) -> None:
    stream = archive(member("README.md", b"# card"), member("adapter_model.safetensors", b"w" * 100))
    seen: list[int] = []
    found = extract(blocks(stream, size), WANTED, tmp_path, seen.append)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "README.md": b"# card",
        "adapter_model.safetensors": b"w" * 100,
    }
    assert found == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert seen[-1] == 106


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (member("../README.md", b"x"), "'../README.md', which was not asked for"),
        (member("/etc/passwd", b"x"), "'/etc/passwd', which was not asked for"),
        (member("./README.md", b"x"), "'./README.md', which was not asked for"),
        (member("other.txt", b"x"), "'other.txt', which was not asked for"),
        (member("README.md", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
        (member("README.md", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "no plain file"),
        (member("README.md", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), "no plain file"),
        (member("README.md", kind=tarfile.FIFOTYPE), "no plain file"),
        (member("README.md", kind=tarfile.DIRTYPE), "no plain file"),
        (member("README.md", b"x" * 11), "has 11 bytes, and may have 10"),
    ],
    ids=["up", "absolute", "dot", "unknown", "symlink", "hard link", "device", "pipe", "folder", "too large"],
)
def test_unrequested_files_end_it_and_are_not_written(
    tmp_path: Path, evil: tuple[tarfile.TarInfo, bytes], message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UnsafeArchiveError, match=message):
        extract(blocks(archive(evil)), WANTED, folder)
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_second_file_of_a_name_does_not_replace_the_first(tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchiveError, match=r"'README\.md' twice"):
        extract(blocks(archive(member("README.md", b"1"), member("README.md", b"2"))), WANTED, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"1"


def test_an_existing_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "outside")
    with pytest.raises(FileExistsError):
        extract(blocks(archive(member("README.md", b"1"))), WANTED, folder)
    assert (tmp_path / "outside").read_bytes() == b"kept"


def test_a_sparse_file_larger_than_its_header_ends_it(tmp_path: Path) -> None:
    info, content = member("README.md", b"x")
    # As GNU tar writes a file of eight GiB that is one hole.
    sizes = {"major": "0", "minor": "1", "map": "0,1", "size": str(2**33)}
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in sizes.items()}
    with pytest.raises(UnsafeArchiveError, match="sparse file"):
        extract(blocks(archive((info, content))), WANTED, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 1, 300, 600, 1030])
def test_a_cut_or_invalid_stream_is_an_error(tmp_path: Path, kept: int) -> None:
    stream = archive(member("adapter_model.safetensors", b"w" * 100), member("README.md", b"# card"))
    with pytest.raises(UnsafeArchiveError, match="no complete tar archive"):
        extract(blocks(stream[:kept] or b"tar: not found"), WANTED, tmp_path)


def test_an_error_of_the_stream_after_the_archive_is_not_lost(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield archive(member("README.md", b"# card"))
        raise ValueError("the command has failed")

    with pytest.raises(ValueError, match="the command has failed"):
        extract(failing(), {"README.md": 10}, tmp_path)


def test_a_stream_that_continues_after_the_archive_is_closed(tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        yield archive(member("README.md", b"# card"))
        while True:
            yield bytes(2**16)

    with pytest.raises(UnsafeArchiveError, match="bytes follow its end"):
        extract(endless(), {"README.md": 10}, tmp_path)
