"""Translates what the hub's client raises into failures of a step, each with its cause and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_api.printable import first_line
from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset, model_unavailable, unreachable
from qlora_trainer.core.filesystem import is_full
from qlora_trainer.core.network import trouble
from qlora_trainer.stores.retry import is_retryable


@dataclass(frozen=True)
class HubRequest:
    """What is asked of a hub, as far as a message about its failure needs it."""

    endpoint: str
    kind: str
    """model or dataset"""
    repository: str
    revision: str | None
    field: str
    """The field of the spec that the token comes from."""
    has_token: bool
    writes: bool

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the StepFailure for whatever the client raises in the body, and OSError only for a full disk."""
        try:
            yield
        except HFValidationError as error:
            raise bad_configuration(f"hf://{self.repository}: {error}") from error
        except OfflineModeIsEnabled as error:
            raise bad_configuration(
                f"hf://{self.repository} cannot be read because HF_HUB_OFFLINE is set: unset it, or use a pvc:// source"
            ) from error
        except HTTPError as error:
            raise self._http_failure(error) from error
        except OSError as error:
            if is_full(error):
                raise
            # The client wraps the answer to its first request for a file.
            if isinstance(error.__cause__, HTTPError):
                raise self._http_failure(error.__cause__) from error
            raise unreachable(f"the transfer of hf://{self.repository} was cut off: {first_line(error)}") from error
        except (RuntimeError, ValueError) as error:
            # From the accelerated transfer (Xet), or from parsing an answer that is not JSON.
            raise unreachable(f"{self.endpoint} did not answer as a hub: {first_line(error)}") from error

    def _http_failure(self, error: HTTPError) -> StepFailure:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        rejected = self._rejection(error, status)
        if rejected is not None:
            permanent = bad_configuration if self.writes else model_unavailable if self.kind == "model" else bad_dataset
            return permanent(rejected)
        found = f"answered HTTP {status}" if status else f"cannot be reached ({type(error).__name__}: {error})"
        return unreachable(f"{self.endpoint} {found} for {self._name}{trouble(self.endpoint, str(error))}")

    @property
    def _name(self) -> str:
        return f"{self.kind} hf://{self.repository}"

    def _rejection(self, error: HTTPError, status: int | None) -> str | None:
        """Why the hub will not do this later either; None if it may. `status`: None if there was no answer."""
        token = f"the token of {self.field}" if self.has_token else f"no token ({self.field})"
        done = "written" if self.writes else "read"
        # Its class is below that of a repository that does not exist, so that it comes first.
        if isinstance(error, GatedRepoError):
            return (
                f"{self._name} is gated and was asked for with {token}: accept its terms at "
                f"{self.endpoint}/{self.repository} and set {self.field} to a read token of that account"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{self._name} has no revision {self.revision!r}: name a branch, tag or commit that exists"
        if isinstance(error, DisabledRepoError):
            return f"{self._name} has been disabled by the hub: use another one"
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            return (
                f"{self._name} does not exist, or may not be {done} with {token} (HTTP {status}): check the name, and "
                f"set {self.field} to a token with which it may be {done}"
            )
        # Conflicts too: somebody else has committed, and the next attempt decides anew.
        if status is not None and not is_retryable(status, conflicts=True):
            return f"{self._name} was rejected by {self.endpoint} with HTTP {status}: check its name"
        return None
