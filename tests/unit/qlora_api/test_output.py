"""Addresses of a job's outputs: separate folders, and credentials only where needed."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.spec.output import OutputSpec

S3 = "s3://bucket/base"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"destination": S3, "base": {"destination": S3}}, "adapter and base need separate folders"),
        ({"destination": f"{S3}/adapter", "base": {"destination": f"{S3}/"}}, "change destination or base.destination"),
        (
            {"merged": {"destination": S3}, "base": {"destination": f"{S3}/quantized"}},
            "merged model and base need separate folders: change merged.destination or base.destination",
        ),
        ({"base": {}}, "base.destination"),
        ({"base": {"destination": "pvc://out/base"}, "secretRef": {"name": "keys"}}, "secretRef is for an s3://"),
    ],
)
def test_a_base_has_a_separate_folder(output: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OutputSpec.model_validate(output)


def test_a_secret_may_be_for_the_base_alone() -> None:
    output = OutputSpec.model_validate({"base": {"destination": S3}, "secretRef": {"name": "keys"}})
    assert output.destinations == {"base.destination": S3}
