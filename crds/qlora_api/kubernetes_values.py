"""Values as Kubernetes has them: names, labels, quantities, tolerations."""

import re
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import SUBDOMAIN

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_LABEL_WORDS = "must be lower-case letters, digits and hyphens, with a letter or digit at both ends"
DNS_SUBDOMAIN = rf"^{SUBDOMAIN}$"
# Zero is rejected here because the API server rejects it later, in a claim's size for example, where no user sees it.
QUANTITY = r"^(0\.[0-9]*[1-9][0-9]*|[1-9][0-9]*(\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
LABEL_KEY = rf"^({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
DOMAIN_PREFIXED_PATH = rf"^{SUBDOMAIN}/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+$"

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
Quantity = Annotated[str, Field(max_length=32, pattern=QUANTITY)]
GPU_MEMORY = r"^[1-9][0-9]{0,3}Gi$"
GpuMemory = Annotated[str, Field(max_length=6, pattern=GPU_MEMORY)]
NamespaceName = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
LabelKey = Annotated[str, Field(max_length=253, pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(max_length=63, pattern=LABEL_VALUE)]
ManagedBy = Annotated[str, Field(max_length=63, pattern=DOMAIN_PREFIXED_PATH)]
"""As in a Job."""

_DECIMAL = {"": 0, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50}


def amount(quantity: str) -> Decimal:
    """The number that a quantity stands for; of a size, its bytes."""
    number = quantity.rstrip("mkMGTPi")
    unit = quantity[len(number) :]
    return Decimal(number) * (Decimal(2) ** _BINARY[unit] if unit in _BINARY else Decimal(10) ** _DECIMAL[unit])


def gibibytes(gpu_memory: str) -> int:
    """The GiB of a GPU's memory, for example of `24Gi`."""
    return int(gpu_memory.removesuffix("Gi"))


_KEY_MESSAGE = "a label key is NAME or PREFIX/NAME, as in a node's labels"


def _check_keys(selector: dict[str, str]) -> dict[str, str]:
    for key in selector:
        if not re.fullmatch(LABEL_KEY, key):
            raise ValueError(f"found {key[:80]!r}, {_KEY_MESSAGE}")
    return selector


NodeSelector = Annotated[
    dict[Annotated[str, Field(max_length=253)], LabelValue],
    # A structural schema cannot constrain keys: rules do.
    Field(
        max_length=16,
        json_schema_extra=rules(
            rule("self.all(key, key.size() <= 253)", "a label key has at most 253 characters"),
            rule(f"self.all(key, key.matches('{LABEL_KEY}'))", _KEY_MESSAGE),
        ),
    ),
    AfterValidator(_check_keys),
]
AccessMode = Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]


# Rejected here because the API server rejects it in the pod, long after it has admitted the QLoRAJob.
_NO_KEY = "a toleration without a key needs operator: Exists"
_VALUE_OF_EXISTS = "operator: Exists takes no value"
_SECONDS = "tolerationSeconds needs effect: NoExecute"


class Toleration(ApiModel):
    """Lets the pods run on nodes with a matching taint, as in a pod's `tolerations`."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.key) || (has(self.operator) && self.operator == 'Exists')", _NO_KEY),
            rule("!has(self.value) || !has(self.operator) || self.operator == 'Equal'", _VALUE_OF_EXISTS),
            rule("!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')", _SECONDS),
        )
    )

    key: LabelKey | None = Field(
        default=None, description="Key of the taint; any taint if not set, which needs operator Exists."
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None, description="How key and value compare; Equal if not set."
    )
    value: LabelValue | None = Field(default=None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; all effects if not set."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Seconds that a NoExecute taint is tolerated; forever if not set."
    )

    @model_validator(mode="after")
    def _as_in_a_pod(self) -> Self:
        if self.key is None and self.operator != "Exists":
            raise ValueError(_NO_KEY)
        if self.value is not None and self.operator == "Exists":
            raise ValueError(_VALUE_OF_EXISTS)
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError(_SECONDS)
        return self


Tolerations = Annotated[tuple[Toleration, ...], Field(max_length=16)]
