"""The kernels' own tests also run on the portable kernels by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slow import slow_except

from hybrid import kernels

ISAS = kernels.available_isas()


@pytest.fixture(params=slow_except(ISAS, ISAS[0], ISAS[-1]))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.using_isa(request.param):
        assert kernels.active_isa() == request.param
        yield request.param
