"""A stored QLoRAProfile, as far as this version can read it, and its status."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from qlora_api.allowed_namespaces import AllowedNamespaces
from qlora_api.profile import Profile
from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.schema import replace
from qlora_operator.decisions.observed.conditions import Value, with_condition
from qlora_operator.decisions.observed.objects import Object, Reason
from qlora_operator.decisions.observed.stored_job import explain

Labels = Mapping[str, str]

_VALID, _PAUSED = "Valid", "Paused"


@dataclass(frozen=True)
class StoredProfile:
    """The profile as stored."""

    name: str
    uid: str
    generation: int
    resource_version: str
    status: QLoRAProfileStatus
    profile: Profile | None
    problem: str = ""
    """Why no job can start with it; empty if jobs can."""
    has_status: bool = True
    """False if the status cannot be read: it must not be overwritten, as it has the GPU hours of deleted jobs."""

    @property
    def selects(self) -> bool:
        """Whether it admits namespaces by their labels."""
        allowed = self.profile.allowed_namespaces if self.profile is not None else None
        return allowed is not None and allowed.selector is not None


def parse_profile(body: Object) -> StoredProfile:
    """Parse a QLoRAProfile, without its spec if that is invalid."""
    metadata, profile, problem = body["metadata"], None, ""
    status: QLoRAProfileStatus | None = None
    try:
        status = QLoRAProfileStatus.model_validate(body.get("status") or {})
        profile = Profile.model_validate(body.get("spec") or {})
    except ValidationError as error:
        part = "status, which has the GPU hours" if status is None else "spec"
        problem = f"this version of the operator cannot read the {part}: {explain(error)}"
    return StoredProfile(
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata.get("resourceVersion", ""),
        status=status or QLoRAProfileStatus(),
        has_status=status is not None,
        profile=profile,
        problem=problem,
    )


def with_selected(profile: Profile, namespaces: Mapping[str, Labels]) -> Profile:
    """Replace the selector of namespaces by the names of those that it selects."""
    allowed = profile.allowed_namespaces
    if allowed is None or allowed.selector is None:
        return profile
    wanted = allowed.selector.match_labels.items()
    selected = {name for name, labels in namespaces.items() if wanted <= labels.items()}
    names = tuple(sorted(selected.union(allowed.names or ())))
    return replace(profile, allowed_namespaces=AllowedNamespaces.model_construct(names=names, selector=None))


def judged(stored: StoredProfile, now: datetime, obstacle: str = "") -> QLoRAProfileStatus:
    """Return the profile's status. `obstacle`: why its namespaces cannot be selected."""
    status = replace(stored.status, observed_generation=stored.generation)
    why = _paused_or_valid(stored)
    if stored.problem:
        why = Reason("InvalidSpec", stored.problem)
    elif stored.selects and obstacle:
        why = Reason("NamespacesNotReadable", f"spec.allowedNamespaces.selector selects nothing: {obstacle}")
    value: Value = "True" if why.word in (_VALID, _PAUSED) else "False"
    return with_condition(status, "Ready", value, why, generation=stored.generation, now=now)


def _paused_or_valid(stored: StoredProfile) -> Reason:
    if stored.profile is not None and stored.profile.paused:
        # Still ready: tools such as `helm upgrade --wait` would wait for the end of the pause.
        return Reason(_PAUSED, "spec.paused is true: its jobs wait until that is removed")
    return Reason(_VALID, "jobs can start with the profile")
