"""Reads the Secrets that a step is given as files."""

from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.core.failures import bad_configuration, unreachable


@dataclass(frozen=True)
class Secret:
    """A Secret that the job names, mounted as a folder with one file per key, or none.

    The values are read when they are needed and are never part of this object, so that no message can show them.
    """

    folder: Path
    field: str
    """The field that names it, for messages: spec.output.secretRef."""
    name: str | None
    """None if the field is not set."""

    def value(self, key: str) -> str | None:
        """The value of a key, or None. Raises StepFailure BAD_CONFIGURATION for no text."""
        path = self.folder / key
        if self.name is None or not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise bad_configuration(
                f"key {key} of Secret {self.name!r} ({self.field}) is not UTF-8 text: store the credential itself, "
                "once encoded in base64"
            ) from error

    def line(self, key: str) -> str | None:
        """As `value`, for a header. Raises StepFailure for more than a line of ASCII."""
        value = self.value(key)
        if value is not None and not (value.isascii() and value.isprintable()):
            raise bad_configuration(
                f"key {key} of Secret {self.name!r} ({self.field}) has a line break, or another character that is not "
                "printable ASCII: store the credential itself, in one line"
            )
        return value

    def require(self, *keys: str, has_own: bool) -> dict[str, str] | None:
        """The values of all these keys, or None if no Secret is named.

        Raises StepFailure UNREACHABLE if one is missing, since the Secret may be made after the job. With `has_own`,
        the user of this machine has credentials, as on a laptop: it returns None instead.
        """
        if self.name is None:
            return None
        values = {key: value for key in keys if (value := self.value(key))}
        missing = [key for key in keys if key not in values]
        if missing and has_own:
            return None
        if missing:
            raise unreachable(
                f"Secret {self.name!r} with {', '.join(missing)} ({self.field}) does not exist in the job's namespace"
            )
        return values

    def __str__(self) -> str:
        return f"the credentials of {self.field}" if self.name else f"no credentials ({self.field})"
