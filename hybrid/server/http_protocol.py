"""GuardedProtocol: uvicorn's HTTP/1.1 with limits on clients that do not send or do not read."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 15.0  # until the headers of a request must be complete
SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long is gone
MAX_CONNECTIONS = 512  # a further one is closed at once


class GuardedProtocol(H11Protocol):
    """Serves a connection. uvicorn itself limits only how long it may be idle between requests."""

    _deadline: asyncio.TimerHandle | None = None  # for a request
    _sweep: asyncio.TimerHandle | None = None
    _n_unread = 0  # bytes that the client had not read at the last sweep

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._await_request()
        self._sweep = self.loop.call_later(SEND_TIMEOUT_S, self._look_for_a_reader)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_waiting():
            self._await_request()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._sweep is not None:
            self._sweep.cancel()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        """Whether headers have begun, or what comes belongs to a request that was answered."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or is_answered

    def _await_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._is_waiting():
            self.transport.close()

    def _look_for_a_reader(self) -> None:
        """Abort the connection if the client has read nothing since the last look."""
        n_unread = self.transport.get_write_buffer_size()
        if n_unread and n_unread == self._n_unread:
            self.transport.abort()
            return
        self._n_unread = n_unread
        self._sweep = self.loop.call_later(SEND_TIMEOUT_S, self._look_for_a_reader)
