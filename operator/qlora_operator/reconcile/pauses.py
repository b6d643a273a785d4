"""Says when a pass over a job is followed by the next one, and spaces those that are in vain.

A pass may ask for the next one at once. That is granted only if it has changed what the next one decides from: else the
same would be decided again and again, as fast as a worker can.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from qlora_operator.keys import Key

_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 300.0
_LONGEST_POSTPONEMENT = 7200.0


@dataclass(frozen=True, slots=True)
class AtOnce:
    """The next pass goes on with what this one has begun."""

    changed: bool
    """Whether this one has written something, or the store now shows what it did not show before."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Somebody else is in the way, and nothing shows when that is over."""

    look_again: float | None = None
    """Seconds after which something else is due; None if nothing is."""


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing is left to do now."""

    look_again: float | None = None
    """Seconds after which something is due; None if the next event is enough."""


NextPass = AtOnce | Blocked | Later
"""What a pass asks for."""


@dataclass
class Pauses:
    """How long each job waits before its next try. After a restart all of them begin anew."""

    longest: float = _LONGEST_SECONDS
    """Seconds."""
    _tries: dict[Key, int] = field(default_factory=dict)

    def until(self, key: Key, asked: NextPass) -> float | None:
        """Seconds until the next pass; None: the next event is enough. 0 only if this one has changed something."""
        match asked:
            case AtOnce(changed=True):
                return 0.0
            case AtOnce():
                return self.next(key)
            case Blocked(look_again):
                pause = self.next(key)
                return pause if look_again is None else min(pause, look_again)
            case Later(look_again):
                self.end(key)
                return look_again

    def next(self, key: Key) -> float:
        """Seconds until the next try, after one more that was in vain: each time twice as many, up to the longest."""
        tries = self._tries.get(key, 0)
        self._tries[key] = tries + 1
        return float(min(self.longest, _FIRST_SECONDS * 2 ** min(tries, 16)))

    def end(self, key: Key) -> None:
        """Nothing is in the way any more, or the job is gone."""
        self._tries.pop(key, None)


@dataclass
class Postponed:
    """What was rejected of each job and is tried again at times of its own, up to two hours apart.

    A pass over the job at another time leaves it alone. After a restart all of it is due.
    """

    _pauses: Pauses = field(default_factory=lambda: Pauses(_LONGEST_POSTPONEMENT))
    _due: dict[Key, datetime] = field(default_factory=dict)

    def due(self, key: Key) -> datetime | None:
        """When the next try is; None if it was never in vain."""
        return self._due.get(key)

    def postpone(self, key: Key, now: datetime) -> None:
        """Note a try in vain."""
        self._due[key] = now + timedelta(seconds=self._pauses.next(key))

    def end(self, key: Key) -> None:
        """It is done, or the job is gone."""
        self._due.pop(key, None)
        self._pauses.end(key)
