"""What reports, model cards and manifests describe: a job and what its prepare and train steps have left."""

from dataclasses import dataclass
from typing import Any

from qlora_api.status import GateStatus
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord


@dataclass(frozen=True)
class TrainedJob:
    """A job whose adapter is trained."""

    name: str
    uid: str
    """`local` where no API server has given one."""
    spec: QLoRAJobSpec
    base_name: str
    """The base model's name as PEFT and servers know it: ORG/NAME of the hub, else the address."""
    prepared: PrepareRecord
    trained: TrainRecord
    gate: GateStatus | None = None
    """How the adapter was judged; None without spec.gate."""
    gpu_hour_price: str = ""
    """What a GPU hour costs, with the currency; empty if that is not known."""

    @property
    def continued(self) -> dict[str, Any] | None:
        """The job whose run this one has taken up, and at which step if that is known; None if it began anew."""
        if self.spec.continues is None:
            return None
        step = self.prepared.continued_step
        return {"job": self.spec.continues, **({} if step is None else {"step": step})}
