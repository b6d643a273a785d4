"""Output of a command in a pod, and the difference between its failure and a closed connection."""

import json
from collections.abc import Iterator

import pytest

from qlora_client.kube.channels import CommandError, standard_output

BINARY, CLOSE, PING = 2, 8, 9
SUCCESS = b"\x03" + json.dumps({"status": "Success"}).encode()
FAILURE = (
    b"\x03"
    + json.dumps(
        {
            "status": "Failure",
            "message": "command terminated with non-zero exit code",
            "details": {"causes": [{"message": "2"}]},
        }
    ).encode()
)


class Played:
    """A connection with these messages."""

    def __init__(self, *messages: tuple[int, bytes]) -> None:
        self._messages: Iterator[tuple[int, bytes]] = iter(messages)

    def recv_data(self, control_frame: bool) -> tuple[int, bytes]:
        return next(self._messages)

    def settimeout(self, timeout: float) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_the_output_is_unchanged_and_without_other_channels() -> None:
    content = bytes(range(256))
    socket = Played(
        (BINARY, b"\x01"),
        (BINARY, b"\x01" + content),
        (PING, b"\x01no"),
        (BINARY, b"\x02a warning"),
        (BINARY, b"\x01more"),
        (BINARY, SUCCESS),
        (CLOSE, b""),
    )
    assert list(standard_output(socket)) == [content, b"more"]


def test_a_failed_command_is_an_error_with_its_output() -> None:
    socket = Played((BINARY, b"\x01part"), (BINARY, b"\x02tar: x: No such file\n"), (BINARY, FAILURE), (CLOSE, b""))
    output = standard_output(socket)
    assert next(output) == b"part"
    with pytest.raises(CommandError, match=r"the command in the pod failed: tar: x: No such file$"):
        next(output)


def test_a_silent_command_fails_with_the_message_of_the_api_server() -> None:
    with pytest.raises(CommandError, match="non-zero exit code"):
        list(standard_output(Played((BINARY, FAILURE), (CLOSE, b""))))


@pytest.mark.parametrize("result", [b"", b"\x03", b"\x03{", b"\x03[]"])
def test_an_end_without_a_result_is_no_success(result: bytes) -> None:
    with pytest.raises(CommandError, match="broke off before its end"):
        list(standard_output(Played((BINARY, b"\x01part"), (BINARY, result), (CLOSE, b""))))
