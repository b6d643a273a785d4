"""Counts requests in the API server's audit log, which has those of every client."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# The agent of the operator's requests, and that of kopf's watches.
OPERATOR_AGENTS = ("qlora-operator", "kopf")
WRITES = ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Request:
    """One request that has been answered; watches are none."""

    verb: str
    resource: str
    """With the subresource: `qlorajobs/status`."""
    namespace: str
    name: str
    seconds: float
    """When it arrived, in seconds since 1970."""
    code: int

    @property
    def call(self) -> str:
        """Verb and resource: `patch qlorajobs/status`."""
        return f"{self.verb} {self.resource}"

    @property
    def writes(self) -> bool:
        """Whether it writes."""
        return self.verb in WRITES


def requests(log: Path, since: int = 0, agents: tuple[str, ...] = OPERATOR_AGENTS) -> list[Request]:
    """The requests of these agents, from that byte of the log on."""
    with log.open("rb") as lines:
        lines.seek(since)
        return list(parse(lines, agents))


def parse(lines: Iterable[bytes], agents: tuple[str, ...] = OPERATOR_AGENTS) -> Iterator[Request]:
    """The requests of these agents; the last line may be half written."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        entry = json.loads(line)
        # A request for a log has a line when its answer begins, and another when it ends.
        ended = entry["stage"] == "ResponseComplete"
        if not ended or entry["verb"] == "watch" or not entry.get("userAgent", "").startswith(agents):
            continue
        reference = entry.get("objectRef", {})
        subresource = f"/{reference['subresource']}" if "subresource" in reference else ""
        yield Request(
            verb=entry["verb"],
            resource=reference.get("resource", entry["requestURI"]) + subresource,
            namespace=reference.get("namespace", ""),
            name=reference.get("name", ""),
            seconds=datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp(),
            code=entry.get("responseStatus", {}).get("code", 0),
        )


def by_call(found: Iterable[Request], per: float) -> dict[str, float]:
    """The number of each, divided by `per`, in alphabetical order."""
    counts = Counter(request.call for request in found)
    return {call: round(count / per, 3) for call, count in sorted(counts.items())}
