"""The GPU's tests run in the formats that the GPU has kernels for."""

from __future__ import annotations

import pytest

from hybrid.kernels import Format
from hybrid.weights.formats import GPU_FORMATS


@pytest.fixture(params=GPU_FORMATS, ids=lambda format: format.name)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found
