"""Plans a job before it is created: GPU memory, as prepare checks it, and GPU hours."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_api.contract import ExitCode
from qlora_api.forecast import (
    ASSUMED_UTILIZATION,
    cost_text,
    hours_of_flops,
    hours_text,
    parse_price,
    tokens_of_run,
    training_flops,
)
from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.usage import ForecastStatus
from qlora_client.client_types import Plan
from qlora_client.files.folders import INSTALL
from qlora_client.kube.errors import ClusterError
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.memory.planned import check_config, measure_with

_MAX_CONFIG_BYTES = 2**22
_SECONDS = 3600


def make_plan(
    spec: QLoRAJobSpec, config: Path | None, gpu_tflops: float | None, tokens: int | None, gpu_hour_price: str | None
) -> Plan:
    """The plan of a job whose model has this config.json, which is fetched from the hub if it is not given.

    Raises ValueError and ClusterError.
    """
    price = None if gpu_hour_price is None else parse_price(gpu_hour_price)
    with TemporaryDirectory() as folder:
        found = config or _fetched(spec, Path(folder))
        try:
            traits = check_config(found, spec)
            fit = MemoryFit.from_config(
                found,
                spec,
                spec.lora.target_modules,
                rows_apart=traits.keeps_rows_apart(spec.training.max_sequence_length),
                mixture_of_experts=traits.mixture_of_experts,
                measure=measure_with(traits),
            )
            parameters = None if traits.mixture_of_experts else fit.parameters
        except StepFailure as failure:
            kind = ValueError if failure.exit_code == ExitCode.BAD_CONFIGURATION else ClusterError
            raise kind(failure.message) from None
        except OSError as error:
            raise ValueError(f"{found} cannot be read: {error.strerror}") from None
    forecast, remark = _forecast(spec, parameters, gpu_tflops, tokens, price)
    return Plan(fit.status, fit.objection, forecast, remark)


def _forecast(
    spec: QLoRAJobSpec,
    parameters: int | None,
    gpu_tflops: float | None,
    of_epoch: int | None,
    price: tuple[str, str] | None,
) -> tuple[ForecastStatus | None, str]:
    tokens, at_most = tokens_of_run(spec.training, of_epoch)
    if gpu_tflops is None:
        return None, "no forecast: give the GPU's speed with gpu_tflops"
    if not gpu_tflops > 0:
        raise ValueError(f"gpu_tflops is {gpu_tflops}, must be more than 0")
    if of_epoch is not None and of_epoch < 1:
        raise ValueError(f"tokens is {of_epoch}, must be 1 or more")
    if parameters is None:
        return None, "no forecast: how many weights each token is multiplied by is not known for this model"
    if tokens is None:
        return None, "no forecast: give the tokens of an epoch with tokens (status.dataset.tokens of an earlier job)"
    seconds = hours_of_flops(training_flops(parameters, tokens, spec.training), gpu_tflops) * _SECONDS
    cost = None if price is None else cost_text(seconds, *price)
    bound = "an upper bound, as sequences are seldom full; " if at_most else ""
    return (
        ForecastStatus(gpu_hours=hours_text(seconds), basis="Flops", utilization=ASSUMED_UTILIZATION, cost=cost),
        f"{bound}loading, evaluations and interruptions are not in it",
    )


def _fetched(spec: QLoRAJobSpec, folder: Path) -> Path:
    source = parse_source(spec.model.source)
    if not isinstance(source, HubSource):
        found = f"spec.model.source is {spec.model.source}"
        raise ValueError(f"{found}: give the model's config.json with config")  # noqa: TRY004 - found in a value
    try:
        # It takes most of a second to import.
        from qlora_client.files.stores import open_store
    except ModuleNotFoundError as error:
        what = f"reading {spec.model.source} takes the library {error.name}, which is missing"
        raise ClusterError(f"{what}: {INSTALL}, or give the model's config.json with config") from None
    config = folder / "config.json"
    with open_store(replace(source, commit=spec.model.revision), {}) as repository:
        config.write_bytes(repository.read(config.name, _MAX_CONFIG_BYTES))
    return config
