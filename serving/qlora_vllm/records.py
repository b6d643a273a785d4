"""Reads the mounted records: channels, and the addresses of adapters by their immutable names."""

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from qlora_api.channel import AdapterName, Channel
from qlora_api.schema import ObservedModel
from qlora_api.spec.output import entry_key
from qlora_cli.channel_record import decode
from qlora_cli.verification import NotVerified
from qlora_trainer.publishing.signing import read_public_key


class _Record(ObservedModel):
    """An entry of output.announce."""

    uri: str
    digest: str


def read_channel(file: Path, namespace: str, key_file: Path) -> Channel:
    """Read a record; if the namespace has a key for channels, a signed one.

    Raises NotVerified or ValueError, also if the record is of another channel than the file's name.
    """
    try:
        record = decode(file.read_text(), namespace, file.name)
    except ValidationError:
        raise ValueError("the record is not of a channel, or of a later release") from None
    if key_file.is_file() and not record.is_signed_by(read_public_key(key_file.read_bytes())):
        raise NotVerified(f"the key {key_file.name} has not signed the record")
    return record.channel


def find_address(records: Path, name: AdapterName, channels_key: Path) -> str:
    """Return the address in a channel of the namespace that leads or led to the adapter, or in the job's entry.

    `channels_key`: the file of the key that signs channels, if there is one. Raises ValueError if none has it.
    """
    folder = records / name.namespace
    # First, as only they may be signed.
    for file in sorted(folder.glob("*.channel")):
        with suppress(ValueError, NotVerified):
            channel = read_channel(file, name.namespace, channels_key)
            for adapter in (channel.adapter, *channel.previous):
                if channel.name_of(adapter) == name:
                    return adapter.uri
    entry = folder / entry_key(name.job)
    if entry.is_file():
        try:
            record = _Record.model_validate_json(entry.read_bytes())
        except ValidationError:
            raise ValueError(f"{entry} is no entry of output.announce") from None
        if record.digest == f"sha256:{name.sha256}":
            return record.uri
    raise ValueError(
        f"neither an entry of the job {name.job} nor a channel in {folder} has the address of this adapter"
    )
