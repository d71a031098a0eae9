"""Reads what a server sends, with a bound on bytes, on time and on pauses between attempts.

huggingface_hub has the session (proxies, certificates), the token and the endpoint. This file makes
the requests, because huggingface_hub's own functions would wait as long as a server pleases,
decompress an answer whole, and report a download only every 10 MB.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import json
import re
import time
import zlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urljoin, urlsplit

from hybrid.hub.watch import MIN_BYTES, SourceFailed, watched

MAX_ANSWER_BYTES = 64 << 20  # of the API, decompressed; a list of 10,000 files has 1 MB
ANSWER_S = 120.0  # until an answer of the API must be complete
MAX_PAUSE_S = 310.0  # of all pauses in one file; the Hub counts requests in windows of 300 s
PIECE_BYTES = 64 << 10  # written and reported at once
_MAX_FAILURES = 5  # of one file in a row
_MAX_REDIRECTS = 10


class Head(NamedTuple):
    """An answer's status and headers, whose names are in any case."""

    status_code: int
    headers: Mapping[str, str]

    @property
    def is_redirect(self) -> bool:
        return self.status_code in (301, 302, 303, 307, 308) and "location" in self.headers

    @property
    def is_transient(self) -> bool:
        return self.status_code in (408, 429) or self.status_code >= 500


class BadStatus(Exception):
    """The server refuses. `response` has the name that it has in huggingface_hub's errors."""

    def __init__(self, response: Head) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response


class BadAnswer(Exception):
    """The server sends what no Hub sends."""


class Sink(Protocol):
    """Where a file's bytes go."""

    def tell(self) -> int: ...
    def write(self, data: bytes, /) -> int: ...
    def restart(self) -> None:
        """Forget all bytes."""


def read_json(url: str, total_s: float) -> Any:
    """Return an answer of the API, which must be complete after `total_s` seconds.

    Its length counts decompressed, so a small answer cannot fill the memory. It is one page: a
    `Link` to a next one is not followed. Raises BadStatus, BadAnswer, Stalled, SourceFailed,
    ValueError or RecursionError.
    """
    data = bytearray()
    with _answer(url, total_s=total_s) as (head, pieces):
        if head.status_code != 200:
            raise BadStatus(head)
        for piece in pieces:
            data += piece
            if len(data) > MAX_ANSWER_BYTES:
                raise BadAnswer(f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes")
    return json.loads(data)


def append(url: str, sink: Sink, size: int) -> None:
    """Append to `sink` what it lacks of the `size` bytes of `url`.

    Continues after a cut connection, and waits where the server asks for at most MAX_PAUSE_S.
    Raises BadStatus, BadAnswer, Stalled or SourceFailed, and what the sink raises.
    """
    failures, paused_s = 0, 0.0
    while (before := sink.tell()) < size:
        error: Exception
        try:
            _append_once(url, sink)
            error = BadAnswer(f"the connection was cut at {sink.tell():,} of {size:,} bytes")
        except BadStatus as refused:
            if not refused.response.is_transient:
                raise
            error = refused
        except SourceFailed as failed:
            if isinstance(failed.error, BadAnswer):
                raise  # again would be no better
            error = failed
        n_bytes = sink.tell() - before
        if n_bytes >= size - before:
            return
        failures = 1 if n_bytes >= MIN_BYTES else failures + 1
        pause_s = min(2.0 ** (failures - 1), 8.0)
        if isinstance(error, BadStatus):
            pause_s = max(pause_s, requested_wait(error.response.headers) or 0.0)
        if failures > _MAX_FAILURES or paused_s + pause_s > MAX_PAUSE_S:
            raise error
        paused_s += pause_s
        time.sleep(pause_s)


def requested_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, or None if it does not say.

    `Retry-After` is of RFC 9110; the Hub sends `RateLimit: "api";r=0;t=55` of
    draft-ietf-httpapi-ratelimit-headers.
    """
    if found := re.search(r";\s*t=(\d{1,12})", headers.get("ratelimit", "")):
        return float(found[1]) + 1  # so that rounding does not make it too early
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,12}", after, re.ASCII):
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _append_once(url: str, sink: Sink) -> None:
    first = sink.tell()
    with _answer(url, first=first) as (head, pieces):
        is_part = head.status_code == 206
        part = re.match(r"bytes (\d+)-", head.headers.get("content-range", ""))
        if head.status_code == 416 or (is_part and (part is None or int(part[1]) != first)):
            sink.restart()  # what is here does not fit what the server has
            return
        if is_part and _encoding(head) not in ("", "identity"):
            raise BadAnswer("part of a file cannot be decompressed")
        if not is_part:
            if head.status_code != 200:
                raise BadStatus(head)
            if first:
                sink.restart()  # a server that cannot resume
        for piece in pieces:
            sink.write(piece)


@contextlib.contextmanager
def _answer(
    url: str, *, first: int = 0, total_s: float = float("inf")
) -> Iterator[tuple[Head, Iterator[bytes]]]:
    """Request `url` from byte `first` on. Gives the head, and the body in decompressed pieces."""
    with contextlib.closing(watched(lambda: _request(url, first), total_s=total_s)) as items:
        head = next(items)
        assert isinstance(head, Head)
        yield head, _decompressed(items, _encoding(head))


def _encoding(head: Head) -> str:
    return head.headers.get("content-encoding", "").strip().lower()


def _decompressed(raw: Iterator[Head | bytes], encoding: str) -> Iterator[bytes]:
    """Yield pieces of at most PIECE_BYTES, whatever a piece of `raw` expands to."""
    if encoding not in ("", "identity", "gzip", "x-gzip"):  # none was requested
        raise BadAnswer(f"the server compresses with {encoding!r:.40}")
    unzip = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
    for data in raw:
        assert isinstance(data, bytes)
        if unzip is None:
            for start in range(0, len(data), PIECE_BYTES):
                yield data[start : start + PIECE_BYTES]
            continue
        while data and not unzip.eof:
            try:
                yield unzip.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise BadAnswer(f"the server's gzip is broken: {error}") from error
            data = unzip.unconsumed_tail
        if unzip.eof:
            return
    if unzip is not None:
        raise BadAnswer("the server's gzip is cut")


def _request(url: str, first: int) -> Generator[Head | bytes, None, None]:
    """Yield the head of the answer, then its body as it was sent.

    Redirections are followed here: the HTTP libraries would first read the body of each, however
    long it is.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if first:
        headers["Range"] = f"bytes={first}-"
    for _ in range(_MAX_REDIRECTS + 1):
        with _opened(url, headers) as (head, body):
            if not head.is_redirect:
                yield head
                yield from body
                return
        target = urljoin(url, head.headers["location"])
        if _origin(target) != _origin(url):  # the token is for the Hub only
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        url = target
    raise BadAnswer(f"more than {_MAX_REDIRECTS} redirections")


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


@contextlib.contextmanager
def _opened(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Head, Iterator[bytes]]]:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # httpx, since huggingface_hub 1.0
        with session.stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=False
        ) as response:
            yield Head(response.status_code, response.headers), response.iter_raw()
    else:
        with contextlib.closing(_get_with_requests(session, url, headers, timeout)) as response:
            yield Head(response.status_code, response.headers), _read_small(response.raw)


def _get_with_requests(session: Any, url: str, headers: Mapping[str, str], timeout: float) -> Any:
    """Do what `session.get` does, but without reading the body of a redirection.

    `Session.send` reads it even if it does not follow the redirection.
    """
    requests: Any = importlib.import_module("requests")  # there if its session is
    request = session.prepare_request(requests.Request("GET", url, headers=dict(headers)))
    settings = session.merge_environment_settings(request.url, {}, True, None, None)
    return session.get_adapter(request.url).send(request, timeout=timeout, **settings)


def _read_small(raw: Any) -> Iterator[bytes]:
    """Yield what arrives, as soon as the version of urllib3 allows."""
    if not hasattr(raw, "read1"):  # before urllib3 2.1: a read returns when it is full
        yield from raw.stream(8192, decode_content=False)
        return
    while data := raw.read1(PIECE_BYTES, decode_content=False):
        yield data
