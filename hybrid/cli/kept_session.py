"""The session of `hybrid.run`, and the file that --session keeps it in."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from hybrid import Engine, Generation, InvalidOption
from hybrid.cli.command_line import printable


class KeptSession:
    """An engine's session. With a `file` it begins with what is saved there, if there is anything,
    and is saved when the block ends without an exception.
    """

    def __init__(self, engine: Engine, file: Path | None = None) -> None:
        """Raises InvalidOption if a plan uses the GPU, and what `Engine.open_session` raises."""
        if file is not None and engine.uses_gpu:
            raise InvalidOption(
                f"--session {file}: keys and values that are on a GPU cannot be saved; use "
                "--device cpu"
            )
        self.engine, self._file, self._reading = engine, file, ""
        started = time.perf_counter()
        saved = file if file is not None and os.path.lexists(file) else None
        self.session = engine.open_session(saved)
        if saved is not None:
            self._reading = self._line("read", started)

    def tell(self, generation: Generation) -> None:
        """After the first answer, say how much of its prompt the file held."""
        if self._reading:
            stats = generation.stats
            taken = f"{stats.cached_tokens} of the prompt's {stats.prompt_tokens} tokens were there"
            print(f"{self._reading}; {taken}", file=sys.stderr)
            self._reading = ""

    def __enter__(self) -> KeptSession:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self.session:
            if self._file is not None and exc is None:
                started = time.perf_counter()
                self.session.save(self._file)
                print(self._line("written", started), file=sys.stderr)

    def _line(self, what: str, started: float) -> str:
        assert self._file is not None
        n, seconds = self.session.position, time.perf_counter() - started
        size = f"{self._file.stat().st_size / 1e6:.1f} MB"
        return printable(
            f"note: session {self._file}: {n} tokens, {size}, {what} in {seconds:.2f} s"
        )
