"""Opens the published folder at an address, wherever it is: on a claim, in a bucket, on a hub or in a registry."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_api.sources import VolumeSource, parse_source
from qlora_client.files.claims import ClaimReader, reading
from qlora_client.files.fixed_profile import profile_of
from qlora_client.files.published import Folder, OnBytes, PublishedFile
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError

INSTALL = "run `pip install '.[client,stores]'` in a checkout of the repository"


@dataclass(frozen=True)
class _ClaimFolder:
    reader: ClaimReader
    path: str

    def read(self, name: str, most: int) -> bytes:
        return self.reader.read(self.path, name, most)

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        self.reader.fetch(self.path, {name: file.size for name, file in files.items()}, into, on_bytes)


@contextmanager
def open_folder(cluster: Cluster, job: Job, address: str, say: Callable[[str], None]) -> Iterator[Folder]:
    """The folder at an address of the job's status.

    A claim is read through a pod, anything else from this machine with the user's credentials. `say` receives progress
    messages. Raises ClusterError.
    """
    try:
        source = parse_source(address)
    except ValueError as error:
        raise ClusterError(f"this version of the program cannot read the adapter's address: {error}") from None
    if isinstance(source, VolumeSource):
        with reading(cluster, job, source.claim, say=say) as reader:
            yield _ClaimFolder(reader, source.path)
        return
    try:
        # Its libraries take most of a second to import, and reading claims needs none of them.
        from qlora_client.files.stores import open_store
    except ModuleNotFoundError as error:
        raise ClusterError(f"reading {address} takes the library {error.name}, which is missing: {INSTALL}") from None
    with open_store(source, profile_of(cluster, job)) as folder:
        yield folder
