"""Fixtures shared by all tests: instruction sets, formats, tiny models."""

from __future__ import annotations

import os

# Torch's OpenMP threads spin for what comes next, and would take the cores from ours. Read when
# torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from hybrid import kernels
from hybrid.kernels import Format

ROOT = Path(__file__).parents[1]

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    with kernels.using_isa(request.param):
        assert kernels.active_isa() == request.param
        yield request.param


@pytest.fixture(params=list(Format), ids=lambda format: format.name)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and tokenizers that development machines have and users' do not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data (../shared/data) is not on this machine")
    return folder
