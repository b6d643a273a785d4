"""Structures of Thrift's compact protocol from a file that somebody made to do harm."""

from io import BytesIO

import pytest

from qlora_trainer.data.read.thrift import I32, LIST, read_structure

_LENGTH_2_TO_31_LESS_1 = b"\xff\xff\xff\xff\x07"
_DOUBLES, _STRUCTURES = b"\xf7", b"\xfc"


def test_integers_are_found_by_number_and_type() -> None:
    assert read_structure(BytesIO(b"\x15\x0e\x15\x01\x00")) == {(1, I32): 7, (2, I32): -1}


def test_a_list_of_structures_is_read() -> None:
    assert read_structure(BytesIO(b"\x19\x1c\x15\x0e\x00\x00")) == {(1, LIST): [{(1, I32): 7}]}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("elements", [_DOUBLES, _STRUCTURES], ids=["doubles", "structures"])
def test_a_list_that_claims_more_than_the_file_has_is_rejected_at_once(elements: bytes) -> None:
    with pytest.raises(ValueError, match="cut off by the end of the file"):
        read_structure(BytesIO(b"\x19" + elements + _LENGTH_2_TO_31_LESS_1))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x1c" * 20, "nests without end"),
        (b"\x15\xff\xff\xff\xff\xff\xff", "has no end"),
        (b"\x15\xff\xff\xff\xff\x7f\x00", "more than 32 bits"),
        (b"\x15\x0e\x05\x02\x0e\x00", "has field 1 twice"),
        (b"\x1b\x00", "there is no structure"),
    ],
)
def test_what_thrift_would_read_without_an_error_is_rejected(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_structure(BytesIO(content))
