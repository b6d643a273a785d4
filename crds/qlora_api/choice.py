"""A setting that a job left open, as prepare chose it."""

import json
from collections.abc import Iterable

from pydantic import Field

from qlora_api.schema import ObservedModel

MAX_CHOICES, MAX_VALUE_LENGTH = 32, 32
PRINTABLE = r"^[ -~]*$"
"""ASCII without control characters: a pod's record is shown on terminals."""
AUTOMATIC = "automatic: "
"""The beginning of the remark with all choices."""


class Choice(ObservedModel):
    """A setting that the job leaves open, with the value that prepare chose."""

    setting: str = Field(
        max_length=64, pattern=PRINTABLE, description="Its path in the spec, for example training.learningRate."
    )
    value: str = Field(
        max_length=MAX_VALUE_LENGTH, pattern=PRINTABLE, description="The chosen value, for example 0.0002."
    )
    reason: str = Field("", max_length=128, pattern=PRINTABLE, description="Why, for people.")

    @classmethod
    def of(cls, setting: str, value: float | str | bool, reason: str) -> "Choice":
        """Return the choice of a number, a word or a truth value."""
        return cls(setting=setting, value=value if isinstance(value, str) else json.dumps(value), reason=reason)

    @property
    def parsed(self) -> object:
        """The value as JSON has it: a number, a truth value, or a word."""
        try:
            return json.loads(self.value)
        except json.JSONDecodeError:
            return self.value

    @property
    def name(self) -> str:
        """The path within its part of the spec."""
        return self.setting.partition(".")[2]


def sentence(choices: Iterable[Choice]) -> str | None:
    """Return the remark with all choices and their reasons, or None without any."""
    parts = [f"{each.name} {each.value}{f' ({each.reason})' if each.reason else ''}" for each in choices]
    return f"{AUTOMATIC}{', '.join(parts)}" if parts else None
