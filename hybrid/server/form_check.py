"""FormChecker: a form of answers that a client sends is compiled in a process of its own first.

llguidance bounds most of what a schema or an expression can cost, but not all: 24 patterns in one
`allOf` take a minute. A process can be ended, a thread cannot.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time

from hybrid.errors import HybridError, InvalidOption
from hybrid.server.api_error import ApiError, unavailable
from hybrid.text.grammar import Form, validate
from predictors.schema import parse_json

LIMIT_S = 2.0
LIMIT_BYTES = 2 << 30  # of memory
PATIENCE_S = 5.0  # that a form waits while another one is compiled


class FormChecker:
    """Raises InvalidOption for forms that are wrong or take too long. Any thread may call it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(2)  # for one form, and one that waits

    def __call__(self, form: Form) -> None:
        # Whoever waits here keeps a thread from other requests, so no more than one does.
        if not self._places.acquire(blocking=False):
            raise _busy()
        try:
            if not self._lock.acquire(timeout=PATIENCE_S):
                raise _busy()
            try:
                self._check(form)
            finally:
                self._lock.release()
        finally:
            self._places.release()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _check(self, form: Form) -> None:
        answer = self._ask(json.dumps([form.kind, form.source]).encode() + b"\n")
        if answer is None:
            raise InvalidOption(f"{form.option}: takes more than {LIMIT_S:g} s to compile")
        if answer:
            raise InvalidOption(f"{form.option}: {answer}")

    def _ask(self, question: bytes) -> str | None:
        """Return what is wrong with a form, "" if nothing is; None if that takes too long."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # something has ended it
        self._process = self._process or _start()
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None
        deadline, answer = time.monotonic() + LIMIT_S, b""
        try:
            pipes[0].write(question)
            pipes[0].flush()
            while not answer.endswith(b"\n"):
                left = deadline - time.monotonic()
                ready, _, _ = select.select([pipes[1]], [], [], max(left, 0))
                data = os.read(pipes[1].fileno(), 1 << 16) if ready else b""
                if not data:  # too late, or the process has died of its limits
                    break
                answer += data
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            self.close()
            return None
        found: str = parse_json(answer)
        return found


def _busy() -> ApiError:
    return unavailable("other grammars are being compiled; try again", "grammars_busy")


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m", __name__]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    if not process.stdout.readline():  # it has begun: its start does not count
        raise HybridError(f"the process that compiles grammars does not start: {command}")
    return process


def main() -> None:
    """Answer questions until there are no more. This is the process's own side."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # a system without such limits
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        kind, source = parse_json(line)
        out.write(json.dumps(validate(Form(kind, source, ""))).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
