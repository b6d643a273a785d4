"""Keeps sample answers without and with the adapter for the report."""

import logging
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_api.schema import ObservedModel

MAX_NEW_TOKENS = 64
"""The longest sample answer."""

logger = logging.getLogger(__name__)


class Sample(ObservedModel):
    """One prompt and its answers."""

    prompt: str
    reference: str = Field(description="The answer in the data.")
    before: str = Field(description="The answer of the base model.")
    after: str = Field(description="The answer with the adapter.")


class Samples(ObservedModel):
    """The content of `report/samples.json`."""

    samples: tuple[Sample, ...] = ()
    missing: str = Field("", description="Why there are none.")


def read_samples(path: Path) -> Samples:
    """Read training's samples, or none, with the reason, if they are unreadable."""
    try:
        return Samples.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        logger.warning("no samples for the report: %s", error)
        return Samples(missing="training did not write any")
