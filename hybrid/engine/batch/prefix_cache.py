"""PrefixCache: sessions that answers left behind, and whose keys and values later prompts reuse.

Keys and values of a token depend only on the tokens before it. So a prompt that begins as another
sequence does takes over or copies that beginning, and its text is the same as without it, bit by
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid.engine.session import Session, common_length
from hybrid.errors import OutOfMemory

LEAST_COPY = 16  # tokens: below, opening a session and copying into it saves nothing
# Sessions: each prompt is compared with all of them, and a short one holds more memory than its
# tokens account for.
MAX_IDLE = 64


class PrefixCache:
    """Idle sessions, least recently used first, within a budget of bytes."""

    def __init__(self, open_session: Callable[[], Session], token_bytes: int, budget: int) -> None:
        """`token_bytes` are those of a token's keys and values in all layers."""
        self._open_session, self._token_bytes, self._budget = open_session, token_bytes, budget
        self._idle: list[Session] = []

    @property
    def is_on(self) -> bool:
        return self._budget > 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values of all idle sessions."""
        return self._token_bytes * sum(session.position for session in [*self._idle])

    def longest(self, prompt: Sequence[int], running: Sequence[Session]) -> int:
        """Return how many first tokens of a prompt `take` would find, its last one aside."""
        sessions = [*self._idle, *running]
        return max((common_length(each.tokens, prompt[:-1]) for each in sessions), default=0)

    def take(self, prompt: Sequence[int], running: Sequence[Session]) -> tuple[Session, int]:
        """Return a session that holds the first tokens of a prompt, and how many these are.

        An idle session whose tokens all begin the prompt is taken over. Otherwise the beginning is
        copied, also from a running one, because what was computed there is final. The last token of
        the prompt is never among them: its logits must be computed. Raises as
        `Engine.open_session` does.
        """
        prefix, candidates = prompt[:-1], [*self._idle, *running] if self._budget else []
        shared = [(common_length(session.tokens, prefix), session) for session in candidates]
        most = max((n for n, _ in shared), default=0)
        sources = [session for n, session in shared if n == most]
        for session in sources if most else ():
            if session in self._idle and list(session.tokens) == prompt[: session.position]:
                self._idle.remove(session)
                session.truncate(most)
                return session, most
        session = self._open(sources[0] if most >= LEAST_COPY else None)
        if most < LEAST_COPY:
            return session, 0
        session.copy_prefix(sources[0], most)
        if sources[0] in self._idle:  # it is now the one used last
            self._idle.remove(sources[0])
            self._idle.append(sources[0])
        return session, most

    def leave(self, session: Session) -> None:
        """Keep a session whose answer has ended. Sessions that exceed the budget are closed."""
        self._idle.append(session)
        while self._idle and (
            not self._budget or self.n_bytes > self._budget or len(self._idle) > MAX_IDLE
        ):
            self._idle.pop(0).close()

    def _open(self, source: Session | None) -> Session:
        """Open a session. If there is no memory, close idle ones, but not `source`, and try again.

        Raises as `Engine.open_session` does.
        """
        while True:
            try:
                return self._open_session()
            except OutOfMemory:
                others = [session for session in self._idle if session is not source]
                if not others:
                    raise
                self._idle.remove(others[0])
                others[0].close()

    def close(self) -> None:
        for session in self._idle:
            session.close()
        self._idle.clear()
