"""Sets the time between passes over a job, with a backoff for those in a loop.

A pass may ask for an immediate next one. That is granted only if it has changed the inputs of the next decision: else
the same decision would repeat as fast as a worker can.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from qlora_operator.keys import Key

_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 300.0
_LONGEST_POSTPONEMENT = 7200.0


@dataclass(frozen=True, slots=True)
class AtOnce:
    """The next pass continues this one."""

    changed: bool
    """Whether this one has written to the API, or the store now shows a newer state."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Another process blocks the pass, and no event shows its end."""

    look_again: float | None = None
    """Seconds after which something else is due; None if nothing is."""


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing is left to do now."""

    look_again: float | None = None
    """Seconds after which something is due; None if the next event is enough."""


NextPass = AtOnce | Blocked | Later
"""The next pass that a pass requests."""


@dataclass
class Pauses:
    """The pause of each job before its next try, reset by a restart."""

    longest: float = _LONGEST_SECONDS
    """Seconds."""
    _tries: dict[Key, int] = field(default_factory=dict)

    def until(self, key: Key, asked: NextPass) -> float | None:
        """Return the seconds until the next pass, or None if the next event is enough.

        They are 0 only if this one has changed the stored state.
        """
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
        """Return the seconds until the next try after one without effect.

        They double each time, up to the longest pause.
        """
        tries = self._tries.get(key, 0)
        self._tries[key] = tries + 1
        return float(min(self.longest, _FIRST_SECONDS * 2 ** min(tries, 16)))

    def end(self, key: Key) -> None:
        """Nothing is in the way any more, or the job is gone."""
        self._tries.pop(key, None)


@dataclass
class Postponed:
    """Rejected writes of each job, each with its next try, at most two hours apart.

    A pass over the job at another time leaves it alone. After a restart all of it is due.
    """

    _pauses: Pauses = field(default_factory=lambda: Pauses(_LONGEST_POSTPONEMENT))
    _due: dict[Key, datetime] = field(default_factory=dict)

    def due(self, key: Key) -> datetime | None:
        """Return the time of the next try, or None if none has failed."""
        return self._due.get(key)

    def postpone(self, key: Key, now: datetime) -> None:
        """Note a failed try."""
        self._due[key] = now + timedelta(seconds=self._pauses.next(key))

    def end(self, key: Key) -> None:
        """It is done, or the job is gone."""
        self._due.pop(key, None)
        self._pauses.end(key)
