"""Holds the valid QLoRAProfiles by name, as lists and the watch have shown them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from qlora_api.profile import Profile
from qlora_api.schema import replace_known
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.profiles.stored_profile import Labels, StoredProfile, parse_profile, with_selected
from qlora_operator.kube.listing import version_number

logger = logging.getLogger(__name__)


class ProfileStore(Mapping[str, Profile]):
    """The profiles that jobs can start with, each with the names of the namespaces that it selects.

    `on_change` is called with the name of each profile that has another spec, admits other namespaces, or whose nodes
    have other GPUs.
    """

    def __init__(self, on_change: Callable[[str], None] = lambda _name: None) -> None:
        self._on_change = on_change
        self._stored: dict[str, StoredProfile] = {}
        self._usable: dict[str, Profile] = {}
        self._deleted: dict[str, int] = {}
        """The version of the latest deletion by name: a late answer may still show an older object."""
        self._namespaces: Mapping[str, Labels] = {}
        self._gpu_memory: Mapping[str, str | None] = {}

    def __getitem__(self, name: str) -> Profile:
        return self._usable[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._usable)

    def __len__(self) -> int:
        return len(self._usable)

    @property
    def stored(self) -> tuple[StoredProfile, ...]:
        """Return all profiles as stored, also invalid ones."""
        return tuple(self._stored.values())

    def changed(self, body: Object, *, deleted: bool = False) -> None:
        """Note a QLoRAProfile. An older version than the held one changes nothing."""
        name, number = body["metadata"]["name"], version_number(body["metadata"].get("resourceVersion", ""))
        if 0 <= number <= max(self._deleted.get(name, 0), self._version(name)):
            return
        before = self._stored.pop(name, None)
        if deleted:
            self._deleted[name] = number
        else:
            self._stored[name] = parse_profile(body)
        self._refresh(name, before)

    def compare(self, bodies: Iterable[Object], version: str) -> None:
        """Note a complete list, taken at `version`: a profile that is not in it and not newer is gone."""
        listed = set()
        for body in bodies:
            listed.add(body["metadata"]["name"])
            self.changed(body)
        taken = version_number(version)
        for name in [name for name in self._stored if name not in listed and self._version(name) <= taken]:
            self._refresh(name, self._stored.pop(name))

    def select(self, namespaces: Mapping[str, Labels]) -> None:
        """Note the labels of all namespaces, by name."""
        self._namespaces = namespaces
        for name, stored in self._stored.items():
            if stored.selects:
                self._refresh(name, stored)

    def note_gpu_memory(self, gpu_memory: Mapping[str, str | None]) -> None:
        """Note the memory of the GPUs of each profile's nodes, by the profile's name."""
        self._gpu_memory = gpu_memory
        for name, stored in self._stored.items():
            self._refresh(name, stored)

    def memory_of_nodes(self, stored: StoredProfile) -> str | None:
        """Return the memory of the GPUs of its nodes, if it counts: the profile sets none."""
        sets_none = stored.profile is not None and stored.profile.gpu_memory is None
        return self._gpu_memory.get(stored.name) if sets_none else None

    def _version(self, name: str) -> int:
        held = self._stored.get(name)
        return version_number(held.resource_version) if held is not None else 0

    def _refresh(self, name: str, before: StoredProfile | None) -> None:
        stored, was_usable = self._stored.get(name), self._usable.pop(name, None)
        if stored is not None and stored.profile is not None:
            profile = with_selected(stored.profile, self._namespaces)
            self._usable[name] = replace_known(profile, gpu_memory=self.memory_of_nodes(stored))
        if _spec_version(stored) == _spec_version(before) and self._usable.get(name) == was_usable:
            return
        if stored is not None and stored.problem:
            logger.error("QLoRAProfile %s: %s", name, stored.problem)
        self._on_change(name)


def _spec_version(stored: StoredProfile | None) -> tuple[str, int] | None:
    return (stored.uid, stored.generation) if stored is not None else None
