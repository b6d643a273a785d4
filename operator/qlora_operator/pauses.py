"""Says when a pass over a job is followed by the next one, and spaces those that are in vain.

A pass may ask for the next one at once. That is granted only if it has changed what the next one decides from: else the
same would be decided again and again, as fast as a worker can.
"""

from dataclasses import dataclass, field

from qlora_operator.workqueue import Key

_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 300.0


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
        """Seconds until the next try, after one more that was in vain: each time twice as many, up to five minutes."""
        tries = self._tries.get(key, 0)
        self._tries[key] = tries + 1
        return float(min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(tries, 16)))

    def end(self, key: Key) -> None:
        """Nothing is in the way any more, or the job is gone."""
        self._tries.pop(key, None)
