"""A trained job, with its records, for reports, model cards and manifests."""

from dataclasses import dataclass

from qlora_api.artifact_status import GateStatus
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.protocols import JsonObject


@dataclass(frozen=True)
class TrainedJob:
    """A job whose adapter is trained."""

    name: str
    uid: str
    """`local` where no API server has given one."""
    spec: ResolvedSpec
    base_name: str
    """The base's name for PEFT and servers: ORG/NAME of the hub, else the address."""
    prepared: PrepareRecord
    trained: TrainRecord
    gate: GateStatus | None = None
    gpu_hour_price: str = ""
    """The price of a GPU hour, with the currency, or an empty string."""
    has_chat_template: bool = True
    """Whether conversations can be written for the model."""

    @property
    def continued(self) -> JsonObject | None:
        """The job whose run this one continues, and the step if known, or None."""
        if self.spec.continues is None:
            return None
        step = self.prepared.continued_step
        return {"job": self.spec.continues, **({} if step is None else {"step": step})}
