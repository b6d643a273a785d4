"""Helm with the chart."""

import pytest

from devcluster import toolchain
from devcluster.layout import from_environment
from tests.support.cluster.chart import Helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(toolchain.built(from_environment(), ["helm"])["helm"])
