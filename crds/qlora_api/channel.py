"""A channel: a name such as support-bot@prod, which leads requests to one adapter and moves to the next.

`qlora promote` writes its record into a ConfigMap, as a statement that is signed or not. Servers follow the record, and
report which one is in effect.
"""

import re
from typing import Final, Literal

from pydantic import Field, field_validator

from qlora_api.lineage import STATEMENT_TYPE, Subject
from qlora_api.schema import ObservedModel

CHANNEL_TYPE: Final = "https://qlora.dev/channel/v1"
CHANNELS_LABEL = "qlora.dev/channels"
"""Of the ConfigMaps that hold channels."""
DEFAULT_CONFIG_MAP = "qlora-channels"
MAX_PREVIOUS = 10
_LABEL = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_CHANNEL = re.compile(rf"({_LABEL})@({_LABEL})")
_ADAPTER = re.compile(rf"(?P<namespace>{_LABEL})/(?P<job>{_LABEL})@sha256:(?P<sha256>[0-9a-f]{{64}})")


class AdapterName(ObservedModel):
    """The name of one adapter for ever: that of its job, with the SHA-256 of its weights."""

    namespace: str
    job: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.job}@sha256:{self.sha256}"


def parse_adapter_name(text: str) -> AdapterName:
    """Parse NAMESPACE/JOB@sha256:DIGEST. Raises ValueError for any other text."""
    found = _ADAPTER.fullmatch(text)
    if found is None:
        raise ValueError("names of adapters are NAMESPACE/JOB@sha256:DIGEST, with status.adapter.sha256 as DIGEST")
    return AdapterName(**found.groupdict())


def channel_key(channel: str) -> str:
    """Return the key of a channel in its ConfigMap. Raises ValueError unless it is NAME@CHANNEL."""
    found = _CHANNEL.fullmatch(channel)
    if found is None:
        raise ValueError(
            f"{channel!r} must be NAME@CHANNEL, such as support-bot@prod: each of lower-case letters, digits and "
            "hyphens, with a letter or digit at both ends, at most 63"
        )
    return f"{found[1]}.{found[2]}.channel"


class ChannelAdapter(ObservedModel):
    """An adapter as a channel leads to it."""

    job: str = Field(description="The job that has trained it, in the channel's namespace.")
    uri: str = Field(description="Its address, as in status.adapter.uri.")
    sha256: str = Field(description="SHA-256 of adapter_model.safetensors.", pattern="^[0-9a-f]{64}$")


class Channel(ObservedModel):
    """One promotion: where the name leads from now on."""

    namespace: str
    name: str = Field(description="NAME@CHANNEL.")
    sequence: int = Field(ge=1, le=2**53, description="One more with each promotion. Servers ignore a lower one.")
    adapter: ChannelAdapter
    percent: int | None = Field(
        None,
        ge=1,
        le=99,
        description="Share of conversations that `adapter` answers; the first of `previous` answers the others. Not "
        "set: all.",
    )
    previous: tuple[ChannelAdapter, ...] = Field(
        (), max_length=MAX_PREVIOUS, description="Adapters before this one, the newest first."
    )
    promoted_at: str = Field(description="RFC 3339, by the clock of the user's machine.")

    @field_validator("name")
    @classmethod
    def _validate_name(cls, name: str) -> str:
        channel_key(name)
        return name

    @property
    def full_name(self) -> str:
        """The name in requests: NAMESPACE/NAME@CHANNEL."""
        return f"{self.namespace}/{self.name}"

    def name_of(self, adapter: ChannelAdapter) -> AdapterName:
        """Return the immutable name of one of its adapters."""
        return AdapterName(namespace=self.namespace, job=adapter.job, sha256=adapter.sha256)


class ChannelStatement(ObservedModel):
    """The in-toto statement that a promotion signs, by itself or in a bundle as that of lineage."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(STATEMENT_TYPE, alias="_type")
    subject: tuple[Subject, ...]
    predicate_type: Literal["https://qlora.dev/channel/v1"] = CHANNEL_TYPE
    predicate: Channel


class ServedProblem(ObservedModel):
    """Why a newer record is not in effect."""

    sequence: int | None = None
    reason: str


class ServedChannel(ObservedModel):
    """A channel as a server follows it."""

    name: str
    """NAMESPACE/NAME@CHANNEL."""
    sequence: int | None = None
    """Of the record in effect; None if none is."""
    adapter: str | None = None
    """The immutable name of its adapter."""
    percent: int | None = None
    previous: str | None = None
    """The adapter that answers the other conversations."""
    problem: ServedProblem | None = None
