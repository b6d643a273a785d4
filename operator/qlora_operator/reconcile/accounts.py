"""Answers, from the profiles' status and nodes, what a job needs of its profile and its namespace's accounts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_api.profile_status import QLoRAProfileStatus
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason
from qlora_operator.decisions.profiles.ledger import counted_seconds

Group = tuple[str, str]
"""Name of a profile, and a namespace."""


@dataclass
class Accounts:
    """The stored status of each profile, and what each namespace has used in this month, also since.

    `no_gpu`: why train can use no GPU of a profile's nodes, by its name.
    """

    stored: Mapping[str, QLoRAProfileStatus] = field(default_factory=dict)
    spent: Mapping[Group, int] = field(default_factory=dict)
    no_gpu: Mapping[str, Reason] = field(default_factory=dict)

    def counted_seconds(self, job: QLoRAJob) -> int:
        """Return the GPU seconds of the job that the stored sums include; 0 without an entry."""
        status = self.stored.get(job.spec.scheduling.profile_name)
        return 0 if status is None else counted_seconds(status, job.namespace, job.uid)

    def spent_seconds(self, job: QLoRAJob) -> int:
        """Return the GPU seconds of the job's namespace with its profile in this month."""
        return self.spent.get((job.spec.scheduling.profile_name, job.namespace), 0)
