"""Helm with the chart, and the chart with the six sets of values."""

import pytest

from devcluster import toolchain
from devcluster.layout import from_environment
from tests.support.chart.rendered import SETS, Helm, Rendered, render


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(toolchain.built(from_environment(), ["helm"])["helm"])


@pytest.fixture(scope="session")
def charts(helm: Helm) -> dict[str, Rendered]:
    return {name: render(helm, values) for name, values in SETS.items()}
