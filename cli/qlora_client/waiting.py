"""Waits until a job or a sweep is in one of several phases."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypeVar

from qlora_client.kube.errors import ClusterError, MissingError, UnreachableError


class _Moment(Protocol):
    """A job or a sweep at one moment."""

    @property
    def uid(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def ended(self) -> bool: ...


M = TypeVar("M", bound=_Moment)


@dataclass(frozen=True)
class Clock:
    """Measures and waits, in seconds."""

    sleep: Callable[[float], None]
    monotonic: Callable[[], float]


@dataclass(frozen=True)
class Wait:
    """The phases to wait for, and for how long."""

    timeout: float
    polling_interval: float
    phases: Collection[str] = ("Succeeded",)

    def __post_init__(self) -> None:
        if not self.phases or not 0 < self.polling_interval <= self.timeout:
            raise ValueError(
                f"found {len(self.phases)} phases, timeout {self.timeout} and polling_interval "
                f"{self.polling_interval}: there must be a phase, and polling_interval must be more than 0 and at most "
                "timeout"
            )

    def follow(
        self, name: str, read: Callable[[], M], callbacks: Collection[Callable[[M], None]] | None, clock: Clock
    ) -> M:
        """Read the object of that name until it is in one of the phases, and return it.

        Raises TimeoutError, ClusterError if it has ended in another phase, and MissingError if it is deleted.
        """
        deadline, seen, uid = clock.monotonic() + self.timeout, "not been reached", ""
        while True:
            try:
                found = read()
            except UnreachableError as error:
                seen = f"not been seen, as {error}"
            else:
                if uid not in ("", found.uid):
                    raise MissingError(f"{name} has been deleted, and another object has its name now")
                uid = found.uid
                for callback in callbacks or ():
                    callback(found)
                if found.phase in self.phases:
                    return found
                if found.ended:
                    raise ClusterError(
                        f"{name} has ended as {found.phase}{f': {found.message}' if found.message else ''}"
                    )
                seen = f"come to {found.phase}"
            left = deadline - clock.monotonic()
            if left <= 0:
                wanted = " or ".join(sorted(self.phases))
                raise TimeoutError(f"{name} has {seen} in {self.timeout:g} s, and not to {wanted}")
            clock.sleep(min(self.polling_interval, left))
