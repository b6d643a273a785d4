"""Keeps verified adapters in read-only folders, each at a path with the digest of its weights."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from pydantic import BaseModel

from qlora_api.channel import AdapterName
from qlora_api.lineage import SIGNED_FILE
from qlora_api.sources import VolumeSource, parse_source
from qlora_cli.verification import Adapter, NotVerified, Verified, check, download, with_lineage
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qlora_trainer.core.filesystem import sync_tree
from qlora_trainer.core.paths import confine
from qlora_trainer.publishing.signing import PublicKey, read_public_key
from qlora_vllm.layout import Layout
from qlora_vllm.records import find_address
from qlora_vllm.served_base import ServedBase

MAX_ADAPTER_BYTES = 8 * 2**30
_PARTIAL = ".partial-"


class _Config(BaseModel):
    """The ranks in PEFT's configuration of an adapter."""

    r: int
    rank_pattern: dict[str, int] | None = None


def remove_partials(layout: Layout) -> None:
    """Remove downloads that an earlier process has begun."""
    for folder in layout.cache.glob(f"{_PARTIAL}*"):
        shutil.rmtree(folder)


def provide(layout: Layout, base: ServedBase, max_rank: int, name: AdapterName) -> Path:
    """Return the folder of the verified adapter, which is downloaded unless it exists.

    vLLM reads the folder later, and again after it has evicted the adapter: so the path has one content for ever. An
    existing folder is verified again, since the key may have been replaced since.

    Raises NotVerified for an adapter that must not be served, and ValueError, OSError or StepFailure for one that
    cannot be read.
    """
    address = find_address(layout.records, name, layout.key(f"{name.namespace}.channels"))
    key_file = layout.key(name.namespace)
    if not key_file.is_file():
        raise NotVerified(f"this server has no key of the namespace {name.namespace} ({key_file})")
    key = read_public_key(key_file.read_bytes())
    target = layout.cache / "adapters" / name.namespace / name.job / name.sha256
    if target.is_dir():
        try:
            verified = _verify(with_lineage(target), address, key, name)
        except NotVerified:
            # Damaged, or signed with a key that was replaced. vLLM has not loaded it: it would not ask again.
            target.chmod(0o755)
            shutil.rmtree(target)
        else:
            _require_fit(verified, target, base, max_rank)
            return target
    with _partial(layout.cache) as folder:
        verified = _verify(_fetch(address, folder, layout.claims), address, key, name)
        _require_fit(verified, folder, base, max_rank)
        # A registry has it next to the artifact.
        (folder / SIGNED_FILE).write_bytes(verified.document)
        for path in folder.iterdir():
            path.chmod(0o444)
        sync_tree(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    target.chmod(0o555)
    return target


def _verify(adapter: Adapter, address: str, key: PublicKey, name: AdapterName) -> Verified:
    """Return the signed facts about the adapter. Raises NotVerified unless they are of the name's."""
    verified = check(adapter, address, key)
    if (found := verified.files.get(ADAPTER_FILE)) != name.sha256:
        raise NotVerified(f"{address} has another adapter: {ADAPTER_FILE} has SHA-256 {found}")
    job = verified.lineage.job
    if (job.namespace, job.name) != (name.namespace, name.job):
        raise NotVerified(f"{address} has the adapter of job {job.name} in the namespace {job.namespace}")
    return verified


def _require_fit(verified: Verified, folder: Path, base: ServedBase, max_rank: int) -> None:
    """Raise NotVerified if the server has another base, or admits no such rank."""
    if (difference := base.difference(verified.lineage.base)) is not None:
        raise NotVerified(difference)
    config = _Config.model_validate_json((folder / ADAPTER_CONFIG_FILE).read_bytes())
    if (rank := max([config.r, *(config.rank_pattern or {}).values()])) > max_rank:
        raise NotVerified(f"its rank is {rank}, and this server allows {max_rank} (--max-lora-rank)")


def _fetch(address: str, folder: Path, claims: Path) -> Adapter:
    """Copy the adapter's files from the mounted claim or from the server into the folder."""
    source = parse_source(address)
    if not isinstance(source, VolumeSource):
        return download(address, folder, MAX_ADAPTER_BYTES)
    root = claims / source.claim
    if not root.is_dir():
        raise ValueError(f"the claim {source.claim} is not mounted at {root}")
    # A link is left out, and so found missing.
    files = [
        path
        for path in confine(root / source.path, root).iterdir()
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]
    if (size := sum(path.stat().st_size for path in files)) > MAX_ADAPTER_BYTES:
        raise OSError(f"{address} has {size:,} bytes, and there is room for {MAX_ADAPTER_BYTES:,}")
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return with_lineage(folder)


@contextmanager
def _partial(cache: Path) -> Iterator[Path]:
    """Yield a folder in the cache, and remove it unless the body has renamed it."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=_PARTIAL, dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
