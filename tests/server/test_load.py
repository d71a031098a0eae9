"""No stream is lost or mixed with another one under load, and memory stays."""

from __future__ import annotations

import pytest
from server_load import run_load, some_bodies


@pytest.mark.parametrize(
    ("seconds", "n_clients"), [(5, 32), pytest.param(60, 32, marks=pytest.mark.slow)]
)
def test_streams_stay_whole_under_load(seconds, n_clients):
    outcome = run_load(seconds, n_clients, some_bodies(100))
    assert outcome.mistakes == []
    assert outcome.n_right > 5
    assert outcome.n_bad > 0
    if seconds >= 60:
        assert abs(outcome.growth_mb) < 20
