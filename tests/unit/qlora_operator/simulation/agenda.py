"""Virtual time: events happen in order, and time passes only between them."""

import heapq
import itertools
from collections.abc import Callable
from datetime import datetime
from random import Random

from tests.support.builders import after, time

Event = Callable[[], None]


class Agenda:
    """The events to come, and the clock, in whole seconds: so the seconds of a pod add up exactly."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0
        self._events: list[tuple[int, int, Event, bool]] = []
        self._numbers = itertools.count()

    def add(self, seconds: float, event: Event, *, of_operator: bool = False) -> None:
        """Let the event happen so many seconds from now, rounded up."""
        moment = self.now - int(-seconds // 1)
        heapq.heappush(self._events, (moment, next(self._numbers), event, of_operator))

    def soon(self, event: Event) -> None:
        """Let it happen after the delay of a controller, which is mostly none."""
        self.add(self.random.choice((0, 0, 0, 1, 4)), event)

    def happen_until(self, end: int) -> bool:
        """Let the next event happen, if it is due by then, and return whether one was."""
        if not self._events or self._events[0][0] > end:
            return False
        moment, _, event, _ = heapq.heappop(self._events)
        self.now = max(self.now, moment)
        event()
        return True

    def happen_meanwhile(self) -> None:
        """Let the next event happen while a request of the operator is on its way."""
        if self._events and self._events[0][0] <= self.now + 1 and not self._events[0][3]:
            self.happen_until(self.now + 1)

    @property
    def moment(self) -> datetime:
        """The time, as the operator reads it."""
        return after(self.now)

    def stamp(self, seconds: int = 0) -> str:
        """The timestamp of so many seconds from now."""
        return time(self.now + seconds)
