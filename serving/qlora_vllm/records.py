"""Finds the address of an adapter by its immutable name, NAMESPACE/JOB@sha256:DIGEST."""

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from qlora_api.channel import AdapterName
from qlora_api.schema import ObservedModel
from qlora_api.spec.output import entry_key
from qlora_cli.channel_record import decode


class _Record(ObservedModel):
    """An entry of output.announce."""

    uri: str
    digest: str


def find_address(records: Path, name: AdapterName) -> str:
    """Return the address in the job's entry, or in a channel of the namespace that leads or led to the adapter.

    Raises ValueError if none of them has it.
    """
    folder = records / name.namespace
    entry = folder / entry_key(name.job)
    if entry.is_file():
        try:
            record = _Record.model_validate_json(entry.read_bytes())
        except ValidationError:
            raise ValueError(f"{entry} is no entry of output.announce") from None
        if record.digest == f"sha256:{name.sha256}":
            return record.uri
    for file in sorted(folder.glob("*.channel")):
        with suppress(ValueError):
            channel = decode(file.read_text(), name.namespace, file.name).channel
            for adapter in (channel.adapter, *channel.previous):
                if channel.name_of(adapter) == name:
                    return adapter.uri
    raise ValueError(
        f"neither an entry of the job {name.job} nor a channel in {folder} has the address of this adapter"
    )
