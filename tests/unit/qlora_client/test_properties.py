"""Parsers of data from a pod or a store: each reads any input, or rejects it as documented."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.downloads import DOWNLOADS
from tests.fuzz.inputs import BOUNDED, inputs


@pytest.mark.parametrize("name", DOWNLOADS)
@BOUNDED
@given(data=st.data())
def test_input_is_read_or_rejected_as_documented(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        DOWNLOADS[name].check(data.draw(inputs(DOWNLOADS[name].seeds)), Path(folder))
