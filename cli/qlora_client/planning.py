"""Plans a job before it is created: GPU memory, as prepare checks it, and GPU hours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qlora_api.contract import ExitCode
from qlora_api.forecast import forecast_of_flops, parse_price, tokens_of_run, training_flops, wall_seconds
from qlora_api.gpus import find_gpu
from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.usage import ForecastStatus
from qlora_client.client_types import Plan
from qlora_client.kube.errors import ClusterError
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.model.source.hub_config import FoundConfig, find_hub_config
from qlora_trainer.steps.planned import plan_memory


@dataclass(frozen=True)
class GpuOfPlan:
    """The GPU to plan for, as far as given."""

    gib: float | None
    """Its memory; None for that of the job."""
    tflops: float | None
    price: tuple[str, str] | None
    """Of an hour, and its currency."""

    @classmethod
    def from_arguments(cls, name: str | None, tflops: float | None, price: str | None) -> Self:
        """The GPU of that name or speed. Raises ValueError."""
        if tflops is not None and not tflops > 0:
            raise ValueError(f"gpu_tflops is {tflops}, must be more than 0")
        parsed = None if price is None else parse_price(price)
        if name is None:
            return cls(None, tflops, parsed)
        gpu = find_gpu(name)
        return cls(gpu.gib, tflops or gpu.tflops, parsed)


def make_plan(spec: QLoRAJobSpec, config: Path | None, gpu: GpuOfPlan, tokens: int | None) -> Plan:
    """The plan of a job whose model has this config.json, which is fetched from the hub if it is not given.

    Raises ValueError and ClusterError.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}, must be 1 or more")
    try:
        found = _found(spec, config)
        traits, fitted = plan_memory(found.path, spec, gpu.gib)
    except StepFailure as failure:
        kind = ValueError if failure.exit_code == ExitCode.BAD_CONFIGURATION else ClusterError
        raise kind(failure.message) from None
    except OSError as error:
        raise ValueError(f"{error.filename or config} cannot be read: {error.strerror}") from None
    parameters = traits.parameters_of_token(fitted.memory.parameters)
    assumed = any(each.name == "epochs" for each in fitted.settings)
    flops_of_token = None if parameters is None else training_flops(parameters, 1, fitted.recomputed_share)
    forecast, wall, remark = _forecast(fitted.spec, flops_of_token, gpu, tokens, assumed=assumed)
    is_short = spec.resources.memory is None and fitted.memory.status.verdict in ("tight", "exceeds")
    pod_memory = "without a profile: pod memory unknown" if is_short else ""
    remark = "; ".join(filter(None, (remark, found.remark, pod_memory)))
    return Plan(fitted.memory.status, fitted.memory.objection, forecast, wall, remark)


def _forecast(
    spec: ResolvedSpec, flops_of_token: float | None, gpu: GpuOfPlan, of_epoch: int | None, *, assumed: bool
) -> tuple[ForecastStatus | None, tuple[float, float] | None, str]:
    """The GPU hours, the shortest and the longest time, and a remark. `assumed`: whether the epochs are."""
    tokens, at_most = tokens_of_run(spec.training, of_epoch)
    if gpu.tflops is None:
        why = "give the GPU with gpu, or its speed with gpu_tflops"
    elif flops_of_token is None:
        why = "how many weights each token is multiplied by is not known for this model"
    elif assumed:
        why = "the rows decide on the epochs: set training.epochs (`qlora plan --data` shows those of the job)"
    elif tokens is None:
        why = "give the tokens of an epoch with tokens (`qlora plan --data` counts them)"
    else:
        flops = flops_of_token * tokens
        bound = "an upper bound, as sequences are seldom full; " if at_most else ""
        return (
            forecast_of_flops(flops, gpu.tflops, *(gpu.price or (None, None))),
            wall_seconds(flops, gpu.tflops, spec.resources.gpu_count),
            f"{bound}loading, evaluations and interruptions are not in it",
        )
    return None, None, f"no forecast: {why}"


def _found(spec: QLoRAJobSpec, config: Path | None) -> FoundConfig:
    if config is not None:
        return FoundConfig(config)
    source = parse_source(spec.model.source)
    if not isinstance(source, HubSource):
        raise bad_configuration(f"spec.model.source is {spec.model.source}: give the model's config.json with config")
    return find_hub_config(source, spec.model, "or give the model's config.json with config")
