"""Spaces the tries of what somebody else is in the way of: each pause is twice as long as the one before."""

from dataclasses import dataclass, field

from qlora_operator.workqueue import Key

_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 300.0


@dataclass
class Pauses:
    """How long each job waits before its next try. After a restart all of them begin anew."""

    _tries: dict[Key, int] = field(default_factory=dict)

    def next(self, key: Key) -> float:
        """Seconds until the next try, after one more that was in vain."""
        tries = self._tries.get(key, 0)
        self._tries[key] = tries + 1
        return float(min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(tries, 16)))

    def end(self, key: Key) -> None:
        """Nothing is in the way any more, or the job is gone."""
        self._tries.pop(key, None)
