"""Finds the address of an adapter by its immutable name, NAMESPACE/JOB@sha256:DIGEST."""

from pathlib import Path

from pydantic import ValidationError

from qlora_api.channel import AdapterName
from qlora_api.schema import ObservedModel
from qlora_api.spec.output import entry_key


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
