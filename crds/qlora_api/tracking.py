"""A run in the tools that teams compare runs with: what a job says about it, and where it is in the end."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qlora_api.profile import ObjectName
from qlora_api.schema import ApiModel, ObservedModel, rule

if TYPE_CHECKING:
    from qlora_api.v1alpha1 import QLoRAJobSpec

SERVED_TRACKERS = ("mlflow", "wandb")
"""Those of training.reportTo that have servers, to which publish uploads."""
NO_TRACKER = (
    "output.tracking is for the servers of mlflow and wandb: add one of them to training.reportTo, or remove tracking"
)

_RunUrl = Annotated[str, Field(max_length=512)]
_ShortText = Annotated[str, Field(max_length=256)]


class TrackingSecretRef(ApiModel):
    """A Secret in the job's namespace, with the credentials of the trackers' servers."""

    name: ObjectName = Field(
        description="Name of the Secret. Its keys: MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD; WANDB_API_KEY."
    )


class TrackingSpec(ApiModel):
    """How publish uploads the history of the run to the servers that the profile names."""

    secret_ref: TrackingSecretRef | None = Field(
        default=None, description="Credentials for these servers. Only publish mounts them, and waits for none."
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$",
        description="MLflow's experiment and the project of Weights & Biases; the job's namespace if not set.",
    )


class TrackedRun(ObservedModel):
    """The run on the server of one tracker."""

    url: _RunUrl | None = Field(None, description="Page of the run; not set if it could not be uploaded.")
    message: _ShortText = Field("", description="Why it could not be uploaded; empty if it was.")


class TrackingStatus(ObservedModel):
    """The run on the servers of the trackers that training.reportTo and the profile name."""

    mlflow: TrackedRun | None = Field(None, description="In MLflow.")
    wandb: TrackedRun | None = Field(None, description="In Weights & Biases.")

    @property
    def failures(self) -> dict[str, str]:
        """Why the run could not be uploaded, by tracker."""
        found = {"mlflow": self.mlflow, "wandb": self.wandb}
        return {name: run.message for name, run in found.items() if run is not None and run.url is None}


def tracking_rules() -> list[dict[str, Any]]:
    """The rule for a job's spec."""
    served = " || ".join(f"'{name}' in self.training.reportTo" for name in SERVED_TRACKERS)
    return [rule(f"!has(self.output.tracking) || {served}", NO_TRACKER)]


def reject_untracked(spec: "QLoRAJobSpec") -> None:
    """Raise ValueError for a spec that the rule rejects."""
    if spec.output.tracking is not None and not set(SERVED_TRACKERS) & set(spec.training.report_to):
        raise ValueError(NO_TRACKER)
