"""Encodes and decodes the record of a channel: a statement, by itself or in a signed bundle."""

import json
from dataclasses import dataclass

from qlora_api.channel import Channel, ChannelStatement, channel_key
from qlora_api.lineage import Subject
from qlora_trainer.publishing.signing import PrivateKey, PublicKey, payload_of, sign, verify_bundle


@dataclass(frozen=True)
class Record:
    """A decoded record."""

    channel: Channel
    bundle: bytes | None
    """What it was in, not verified; None for a statement by itself."""

    def is_signed_by(self, key: PublicKey) -> bool:
        """Whether the key has signed it."""
        try:
            return self.bundle is not None and bool(verify_bundle(self.bundle, key))
        except ValueError:
            return False


def decode(text: str, namespace: str, key: str) -> Record:
    """Decode the record under a key of a ConfigMap. Raises ValueError, also if it is of another channel."""
    content = text.encode()
    bundle = content if b"dsseEnvelope" in content else None
    statement = ChannelStatement.model_validate_json(content if bundle is None else payload_of(bundle))
    channel = statement.predicate
    if (channel.namespace, channel_key(channel.name)) != (namespace, key):
        raise ValueError(f"it is of {channel.full_name}")
    return Record(channel, bundle)


def encode(channel: Channel, key: PrivateKey | None) -> str:
    """Encode the record, signed if there is a key."""
    subject = Subject(name=str(channel.name_of(channel.adapter)), digest={"sha256": channel.adapter.sha256})
    statement = ChannelStatement(subject=(subject,), predicate=channel).dump()
    if key is None:
        return json.dumps(statement, indent=2) + "\n"
    return sign(json.dumps(statement, sort_keys=True).encode(), key).decode()
