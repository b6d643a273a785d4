"""Knows which jobs are in which group, as the watches have shown them, so that a job need not look for the others."""

from dataclasses import dataclass, field

from qlora_operator.decisions.observed.members import Member, member_of
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, parse_job

_Group = tuple[str, str]
"""Namespace and name."""


@dataclass
class GroupIndex:
    """Jobs of groups by UID, in the version that is held."""

    _groups: dict[_Group, dict[str, Member]] = field(default_factory=dict)
    _homes: dict[str, _Group] = field(default_factory=dict)
    """The group of each job, by its UID."""

    def of(self, namespace: str, name: str) -> tuple[Member, ...]:
        """The jobs of the group that can be read."""
        return tuple(self._groups.get((namespace, name), {}).values())

    def note(self, body: Object) -> None:
        """Note a QLoRAJob as it is now."""
        member = _read(body)
        if member is None:
            self.drop(str(body["metadata"]["uid"]))
            return
        group = self._homes.setdefault(member.uid, (member.namespace, member.group))
        self._groups.setdefault(group, {})[member.uid] = member

    def drop(self, uid: str) -> None:
        """Forget a QLoRAJob: it is gone."""
        group = self._homes.pop(uid, None)
        if group is None:
            return
        members = self._groups[group]
        del members[uid]
        if not members:
            del self._groups[group]


def _read(body: Object) -> Member | None:
    """The job as the others of its group see it; None if it is in none, or cannot be read."""
    if not (body.get("spec") or {}).get("group"):
        return None
    try:
        return member_of(parse_job(body))
    except UnreadableJobError:
        return None
