"""Finds the config.json of a model of the Hub, to plan a job: cached, fetched or packaged. Loads no torch."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_api.sources import HubSource
from qlora_api.spec.model import BaseModelSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable, unreachable
from qlora_trainer.model.source.files import CONFIG

INSTALL = "run `pip install '.[cli,trainer]'` in a checkout of the repository"
"""What to do where the trainer, or its client of the Hub, is not installed."""
PACKAGED = Path(__file__).parent / "configs"
"""The configs that come with this release, without the fields that a plan does not read."""
_SAME_SIZES: Mapping[str, str] = {
    "HuggingFaceTB/SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Llama-3.1-70B": "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B": "meta-llama/Llama-3.2-3B-Instruct",
    "mistralai/Mistral-7B-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
}
"""Models that were made from one base."""
_DEFAULT_REVISION = "main"
_HUB_SECONDS = 5.0


@dataclass(frozen=True)
class FoundConfig:
    """The config.json of a model."""

    path: Path
    remark: str = ""
    """Why it is the packaged one, if it is."""


def find_hub_config(source: HubSource, model: BaseModelSpec, otherwise: str) -> FoundConfig:
    """Return the model's config.json: that of the cache, of the hub, or the packaged one if the hub cannot be reached.

    `otherwise`: how to do without, for the message. Raises StepFailure.
    """
    try:
        return FoundConfig(_fetch(source, model, otherwise))
    except StepFailure as failure:
        packaged = packaged_config(source.repository)
        if failure.exit_code != ExitCode.UNREACHABLE or packaged is None:
            raise
        if model.revision not in (None, _DEFAULT_REVISION):
            raise unreachable(
                f"{failure.message}; the config of {source.repository} that is packaged with this release is that of "
                f"the revision {_DEFAULT_REVISION}, and spec.model.revision is {model.revision}"
            ) from failure
        return FoundConfig(
            packaged, f"config of {source.repository} as packaged with this release; the Hub cannot be reached"
        )


def packaged_config(repository: str) -> Path | None:
    """Return the config.json that is packaged for this repository, or None."""
    name = _SAME_SIZES.get(repository, repository).replace("/", "--")
    path = PACKAGED / f"{name}.json"
    return path if path.is_file() else None


def _fetch(source: HubSource, model: BaseModelSpec, otherwise: str) -> Path:
    require_hub_client(otherwise)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with fetching(model, otherwise):
        cached = try_to_load_from_cache(source.repository, CONFIG, revision=model.revision)
        if isinstance(cached, str):
            return Path(cached)
        has_hub = hub_answers(source, model)
        config = hf_hub_download(source.repository, CONFIG, revision=model.revision, local_files_only=not has_hub)
        return Path(config)


def hub_answers(source: HubSource, model: BaseModelSpec) -> bool:
    """Whether the hub answers, asked once: its client tries again for a minute. Raises its rejection of the model."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    address = hf_hub_url(source.repository, CONFIG, revision=model.revision)
    try:
        get_hf_file_metadata(address, token=get_token(), timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError):
        return False
    return True


def require_hub_client(otherwise: str) -> None:
    """Raise StepFailure, naming `otherwise`, unless the hub's client is installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise bad_configuration(f"the Hugging Face client is not installed: {INSTALL}, {otherwise}")


@contextmanager
def fetching(model: BaseModelSpec, otherwise: str) -> Iterator[None]:
    """Raise StepFailure, naming `otherwise`, if the body cannot fetch files."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise bad_configuration(f"spec.model.source is {model.source}: {error}") from error
    except HfHubHTTPError as error:
        raise model_unavailable(
            f"{model.source} cannot be read: {str(error).splitlines()[0]} Check the name, log in with `hf auth login`, "
            f"{otherwise}"
        ) from error
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise unreachable(f"the hub cannot be reached for {model.source}: try again, {otherwise}") from error
