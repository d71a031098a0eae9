"""One engine and one server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_client import Client, serving

import hybrid


@pytest.fixture(scope="session")
def engine() -> Iterator[hybrid.Engine]:
    """The bundled model. It learned no chats, but a template without markers does no harm."""
    with hybrid.load("stories", threads=2, chat_template="minicpm") as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: hybrid.Engine) -> Iterator[Client]:
    with serving(engine) as client:
        yield client
