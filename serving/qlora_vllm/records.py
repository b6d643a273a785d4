"""Finds the address of an adapter by its immutable name, NAMESPACE/JOB@sha256:DIGEST."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qlora_api.schema import ObservedModel
from qlora_api.spec.output import entry_key

_LABEL = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?P<namespace>{_LABEL})/(?P<job>{_LABEL})@sha256:(?P<sha256>[0-9a-f]{{64}})")


@dataclass(frozen=True)
class AdapterName:
    """The name of one adapter for ever: that of its job, with the SHA-256 of its weights."""

    namespace: str
    job: str
    sha256: str


def parse_name(text: str) -> AdapterName:
    """Parse a name. Raises ValueError for any other text."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise ValueError("names of adapters are NAMESPACE/JOB@sha256:DIGEST, with status.adapter.sha256 as DIGEST")
    return AdapterName(**found.groupdict())


class _Record(ObservedModel):
    """An entry of output.announce."""

    uri: str
    digest: str


def find_address(records: Path, name: AdapterName) -> str:
    """Return the address in the record of the job, a file in the folder of its namespace.

    Raises ValueError unless there is a record, of this adapter.
    """
    file = records / name.namespace / entry_key(name.job)
    try:
        record = _Record.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no job {name.job} of the namespace {name.namespace} has announced an adapter here") from None
    except ValidationError:
        raise ValueError(f"{file} is no entry of output.announce") from None
    if record.digest != f"sha256:{name.sha256}":
        raise ValueError(f"the job has announced another adapter, {record.digest}")
    return record.uri
