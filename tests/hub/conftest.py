"""The local hub, as a fixture."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils
import pytest
from huggingface_hub import constants, file_download
from local_hub import CHUNK, REPO, SMALL, UNWANTED, WEIGHTS, LocalHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running local hub that huggingface_hub talks to, with an empty cache."""
    server = LocalHub()
    server.repos[REPO] = {**SMALL, **UNWANTED, "model.safetensors": WEIGHTS}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    for module in (constants, file_download):  # before huggingface_hub 1.0 the latter has its own
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hybrid.hub.transfer.PIECE_BYTES", CHUNK)
    # Most tests' files are no model.
    monkeypatch.setattr("hybrid.hub.catalog._check_all_but_weights", lambda folder: None)
    clock = SimpleNamespace(sleep=server.pauses.append, time=time.time)
    monkeypatch.setattr("hybrid.hub.transfer.time", clock)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    close = getattr(huggingface_hub.utils, "close_session", None)  # since huggingface_hub 1.0
    if close:
        close()
    server.has_ended.set()
    server.shutdown()
    thread.join()
    server.server_close()
