"""Which answers of a server are worth another request, and how often it is sent."""

from collections.abc import Callable

import pytest

from qlora_trainer.core.failures import bad_dataset, unreachable
from qlora_trainer.stores import retry as retry_module
from qlora_trainer.stores.retry import is_retryable, read_back, retry


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait, none of them real."""
    seconds: list[float] = []
    monkeypatch.setattr(retry_module, "sleep", seconds.append)
    return seconds


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises these, one for each call, and then answers."""
    left = iter(errors)

    def ask() -> str:
        error = next(left, None)
        if error is not None:
            raise error
        return "answer"

    return ask


@pytest.mark.parametrize(
    ("statuses", "where_others_write", "elsewhere"),
    [
        ((408, 425, 429, 500, 501, 502, 503, 504), True, True),
        ((409, 412), True, False),
        ((400, 401, 403, 404, 405, 416, 451), False, False),
    ],
    ids=["server errors", "conflicts", "rejections"],
)
def test_server_errors_are_retryable(statuses: tuple[int, ...], where_others_write: bool, elsewhere: bool) -> None:
    for status in statuses:
        assert is_retryable(status, conflicts=True) is where_others_write
        assert is_retryable(status) is elsewhere


def test_a_request_is_repeated_after_each_wait(waited: list[float]) -> None:
    answer = retry(failing(OSError(), OSError()), waits=(1, 2, 4), retryable=lambda error: isinstance(error, OSError))
    assert answer == "answer"
    assert waited == [1, 2]


def test_the_last_error_is_raised(waited: list[float]) -> None:
    with pytest.raises(OSError, match="second"):
        retry(failing(OSError("first"), OSError("second")), waits=(1,), retryable=lambda _: True)
    assert waited == [1]


def test_a_permanent_error_is_raised_immediately(waited: list[float]) -> None:
    with pytest.raises(OSError, match="final"):
        retry(failing(OSError("final")), waits=(1, 2), retryable=lambda _: False)
    assert waited == []


def test_a_credential_that_an_error_quotes_is_not_logged(waited: list[float], caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("503 for https://cdn.example.org/x?X-Amz-Signature=canary&x=1")
    retry(failing(error), waits=(1,), retryable=lambda _: True)
    assert "503 for https://cdn.example.org" in caplog.text
    assert "canary" not in caplog.text


def test_reading_back_survives_two_lost_connections_and_no_third(waited: list[float]) -> None:
    assert read_back(failing(unreachable("one"), unreachable("two"))) == "answer"
    with pytest.raises(Exception, match="three"):
        read_back(failing(*map(unreachable, ("one", "two", "three"))))
    with pytest.raises(Exception, match="permanent"):
        read_back(failing(bad_dataset("permanent")))
