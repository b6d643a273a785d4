"""Asks vLLM servers with the plugin which promotions are in effect, and waits for one."""

from collections.abc import Sequence

import urllib3
from pydantic import ValidationError

from qlora_api.channel import Channel, ServedChannel
from qlora_api.schema import ObservedModel
from qlora_client.kube.errors import ClusterError, RejectedError, UnreachableError, unreachable
from qlora_client.waiting import Clock

_PATH = "/v1/qlora/adapters"
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 2.0


class _Answer(ObservedModel):
    channels: tuple[ServedChannel, ...]


def read_served(url: str, api_key: str | None) -> Sequence[ServedChannel]:
    """Return the channels of the server. Raises ClusterError: UnreachableError if it may answer later."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # A redirect could lead the key to another server.
        answer = urllib3.request(
            "GET", url.rstrip("/") + _PATH, headers=headers, redirect=False, retries=False, timeout=_ANSWER_SECONDS
        )
    except urllib3.exceptions.HTTPError as error:
        raise unreachable("the server", url, error) from None
    if answer.status >= 500:
        raise UnreachableError(f"{url} answered with HTTP {answer.status}")
    if answer.status in (401, 403):
        raise RejectedError(f"{url} answered with HTTP {answer.status}: set VLLM_API_KEY to the server's API key")
    try:
        return _Answer.model_validate_json(answer.data).channels
    except ValidationError:
        raise RejectedError(
            f"{url}{_PATH} answered with HTTP {answer.status} and no list of channels: it must be a vLLM server with "
            "the plugin qlora"
        ) from None


def find_served(served: Sequence[ServedChannel], channel: Channel) -> ServedChannel | None:
    """Return the channel among those of a server."""
    return next((each for each in served if each.name == channel.full_name), None)


def is_in_effect(found: ServedChannel | None, channel: Channel) -> bool:
    """Whether the server has switched to this record. Raises RejectedError if it will not."""
    if found is None:
        return False
    if found.problem is not None and found.problem.sequence == channel.sequence:
        raise RejectedError(found.problem.reason)
    if found.sequence is None or found.sequence < channel.sequence:
        return False
    if (found.sequence, found.adapter) == (channel.sequence, str(channel.name_of(channel.adapter))):
        return True
    raise RejectedError(f"promotion {found.sequence} is in effect there, to {found.adapter}")


def wait_for_server(url: str, api_key: str | None, channel: Channel, timeout: float, clock: Clock) -> None:
    """Wait until the server has switched to this record. Raises ClusterError if it does not in time or at all."""
    deadline = clock.monotonic() + timeout
    while True:
        try:
            found = find_served(read_served(url, api_key), channel)
        except UnreachableError as error:
            seen = str(error)
        else:
            if is_in_effect(found, channel):
                return
            problem = found and found.problem
            seen = problem.reason if problem else "it has not seen the record, which takes the kubelet up to a minute"
        if clock.monotonic() >= deadline:
            raise ClusterError(f"not within {timeout:g} s: {seen}")
        clock.sleep(_PAUSE_SECONDS)
