"""A server that is slow, endless or hostile, and a cache in which others planted links.

Each download ends in one clear error, in bounded time and memory, and writes nothing elsewhere.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from local_hub import COMMIT, REPO, SMALL, WEIGHTS, Handler, LocalHub, contents

from hybrid.errors import DownloadFailed, InvalidCheckpoint
from hybrid.hub import download, model_files, transfer, watch
from hybrid.hub.catalog import resolve
from hybrid.hub.transfer import requested_wait
from hybrid.hub.watch import SourceFailed, Stalled, watched

API, FILE, BYTES = "/api/models", "/config.json", "/cdn"
MODEL = {**SMALL, "model.safetensors": WEIGHTS}
Answer = Callable[[Handler], None]


@contextlib.contextmanager
def impatient(seconds: float) -> Iterator[None]:
    """Give up after so short a time. Nothing must succeed meanwhile: a test machine may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "PATIENCE_S", seconds)
        yield


def drip(start: bytes, endless: bytes = b"a") -> Answer:
    """Send `start` at once, and then `endless` again and again, byte by byte."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        for byte in itertools.cycle(endless):
            if handler.server.has_ended.wait(0.02):
                return
            try:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
            except OSError:
                handler.server.n_given_up.release()
                return

    return answer


def flood(start: bytes, block: bytes = bytes(1 << 16)) -> Answer:
    """Send `start` and then blocks as fast as possible until the client is gone."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        with contextlib.suppress(OSError):
            while not handler.server.has_ended.is_set():
                handler.wfile.write(block)

    return answer


def say(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda handler: handler.answer(status, body, **headers)


# Time


OK = b"HTTP/1.1 200 OK\r\n"
LONG = OK + b"Content-Length: 40960\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        pytest.param("GET", API, drip(OK + b"X-Header: "), id="headers of the list"),
        pytest.param("GET", API, drip(LONG, b" "), id="list"),
        pytest.param("GET", API, drip(CHUNKED + b"1;"), id="a chunk's extension"),
        pytest.param("GET", API, drip(b"HTTP/1.1 302 Found\r\nLocation: /"), id="redirection"),
        pytest.param("HEAD", FILE, drip(OK + b"X-Header: "), id="headers of a small file"),
        pytest.param("GET", FILE, drip(OK + b"Content-Length: 25\r\nX: "), id="small file"),
        pytest.param("GET", BYTES, drip(OK + b"X-Header: "), id="headers of a large file"),
        pytest.param("GET", BYTES, drip(LONG, WEIGHTS), id="large file"),
        pytest.param("GET", BYTES, drip(CHUNKED + b"1;"), id="a chunk's extension in a file"),
        pytest.param("GET", BYTES, drip(b""), id="no HTTP at all"),
    ],
)
def test_a_byte_now_and_then_is_not_waited_for(
    hub: LocalHub, method: str, path: str, answer: Answer
) -> None:
    hub.answers[method, path] = answer
    message = r"Stalled.*(sent only|not complete).*Try again"
    with impatient(0.3), pytest.raises(DownloadFailed, match=message):
        resolve(REPO)
    hub.answers.clear()
    assert contents(resolve(REPO)) == MODEL


def test_a_server_that_is_given_up_loses_its_connection(hub: LocalHub) -> None:
    hub.answers["GET", API] = drip(LONG, b" ")
    with impatient(0.2), pytest.raises(DownloadFailed, match="Stalled"):
        resolve(REPO)
    assert hub.n_given_up.acquire(timeout=10)  # no thread reads on for ever


def test_an_answer_of_the_api_has_a_time_in_all(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it sends: the limit of bytes is another matter."""
    monkeypatch.setattr(transfer, "ANSWER_S", 0.1)
    monkeypatch.setattr(watch, "MIN_BYTES", 0)
    hub.answers["GET", API] = drip(LONG, b" ")
    with pytest.raises(DownloadFailed, match=r"not complete after 0\.1 s"):
        resolve(REPO)


def test_an_api_of_endless_pages_is_read_once(hub: LocalHub) -> None:
    """A `Link` to a next page is not followed."""
    list_files = Handler.list_files
    next_page = f'<{hub.endpoint}/api/models/{REPO}?cursor=1>; rel="next"'

    def answer(handler: Handler) -> None:
        send = handler.answer
        handler.answer = lambda *args, **headers: send(*args, Link=next_page, **headers)  # type: ignore[method-assign]
        list_files(handler, REPO, hub.repos[REPO])

    hub.answers["GET", API] = answer
    assert contents(resolve(REPO)) == MODEL
    assert len(hub.seen("GET", API)) == 1


@pytest.mark.parametrize(("method", "path"), [("GET", API), ("GET", FILE), ("GET", BYTES)])
def test_endless_redirections_end(hub: LocalHub, method: str, path: str) -> None:
    hub.answers[method, path] = lambda handler: handler.answer(302, Location=handler.path)
    with pytest.raises(DownloadFailed, match="more than 10 redirections"):
        resolve(REPO)
    assert 10 <= len(hub.seen(method, path)) <= 11  # the first may have another path
    assert hub.pauses == []


def test_the_body_of_a_redirection_is_not_read(hub: LocalHub) -> None:
    start = f"HTTP/1.1 302 Found\r\nLocation: {hub.endpoint}/cdn/{REPO}/model.safetensors\r\n\r\n"
    hub.answers["GET", "/resolve/" + COMMIT + "/model.safetensors"] = flood(start.encode())
    assert contents(resolve(REPO)) == MODEL


PAUSE = {"RateLimit": '"api";r=0;t=100000', "Retry_After": "100000"}


@pytest.mark.parametrize("header", PAUSE)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", API), ("HEAD", FILE), ("GET", FILE), ("GET", BYTES)]
)
def test_a_pause_of_a_day_is_not_made(hub: LocalHub, method: str, path: str, header: str) -> None:
    hub.answers[method, path] = say(429, **{header: PAUSE[header]})
    with pytest.raises(DownloadFailed, match=r"busy \(HTTP 429\).* 100,00[01] s\. Run the same"):
        resolve(REPO)
    assert hub.pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_short_pauses_are_made_and_bounded_in_all(hub: LocalHub, status: int) -> None:
    hub.answers["GET", BYTES] = say(status, Retry_After="100")
    with pytest.raises(DownloadFailed, match=f"HTTP {status}"):
        resolve(REPO)
    assert hub.pauses == [100, 100, 100]
    assert sum(hub.pauses) <= transfer.MAX_PAUSE_S


def test_after_a_pause_the_download_goes_on(hub: LocalHub) -> None:
    def busy_once(handler: Handler) -> None:
        hub.answers.clear()
        handler.answer(429, Retry_After="7")

    hub.answers["GET", BYTES] = busy_once
    assert contents(resolve(REPO)) == MODEL
    assert hub.pauses == [7]


def test_a_connection_that_is_cut_after_each_byte_is_given_up(hub: LocalHub) -> None:
    def one_byte(handler: Handler) -> None:
        first = int(handler.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        handler.answer(
            206 if first else 200,
            WEIGHTS[first : first + 1],
            Content_Length=str(len(WEIGHTS) - first),
            Content_Range=f"bytes {first}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}",
        )

    hub.answers["GET", BYTES] = one_byte
    with pytest.raises(DownloadFailed, match=r"model\.safetensors"):
        resolve(REPO)
    assert len(hub.seen("GET", BYTES)) == 6
    hub.answers.clear()
    assert contents(resolve(REPO)) == MODEL


def test_the_wait_that_a_server_wants() -> None:
    assert requested_wait({}) is None
    assert requested_wait({"retry-after": " 120 "}) == 120
    assert requested_wait({"ratelimit": '"api";r=0;t=55', "retry-after": "1"}) == 56
    assert requested_wait({"retry-after": "soon"}) is None
    assert requested_wait({"retry-after": "9" * 5000}) is None
    assert requested_wait({"retry-after": formatdate(time.time() - 60, usegmt=True)}) == 0
    wait = requested_wait({"retry-after": formatdate(time.time() + 3600, usegmt=True)})
    assert wait is not None
    assert 3500 < wait < 3700


def counted(n: int) -> Generator[bytes, None, None]:
    for _ in range(n):
        yield b"piece"


def test_a_slow_consumer_is_not_the_servers_fault() -> None:
    pieces = []
    with impatient(0.2):
        for piece in watched(lambda: counted(5)):
            time.sleep(0.1)
            pieces.append(piece)
    assert pieces == [b"piece"] * 5


def test_an_error_of_the_source_is_told_from_one_of_the_consumer() -> None:
    def source() -> Generator[bytes, None, None]:
        yield b"piece"
        raise OSError("the network")

    items = watched(source)
    assert next(items) == b"piece"
    with pytest.raises(SourceFailed) as caught:
        next(items)
    assert isinstance(caught.value.error, OSError)


def test_an_abandoned_source_is_closed() -> None:
    is_open, is_closed = threading.Event(), threading.Event()

    def source() -> Generator[bytes, None, None]:
        try:
            is_open.wait(10)
            for _ in range(1000):  # more than the queue holds
                yield b"late"
        finally:
            is_closed.set()

    with impatient(0.05), pytest.raises(Stalled, match="only 0 bytes"):
        next(watched(source))
    is_open.set()
    assert is_closed.wait(10)


def test_a_lock_whose_holder_does_nothing_is_reported(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock  # huggingface_hub's

    monkeypatch.setattr(download, "_LOCK_S", 0.05)
    monkeypatch.setattr(download, "_HOLDER_PATIENCE_S", 0.2)
    folder = tmp_path / "hf/hub/.locks/models--someone--tiny"
    folder.mkdir(parents=True)
    with (
        FileLock(folder / f"{hashlib.sha256(WEIGHTS).hexdigest()}.lock"),
        pytest.raises(DownloadFailed, match=r"another program holds .*\.lock"),
    ):
        resolve(REPO)
    assert contents(resolve(REPO)) == MODEL


# Bytes


def gzipped_zeros(n_bytes: int) -> bytes:
    return gzip.compress(bytes(n_bytes), 1)


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_an_answer_is_bounded_after_decompression(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    assert transfer.MAX_ANSWER_BYTES == 64 << 20
    monkeypatch.setattr(transfer, "MAX_ANSWER_BYTES", 1 << 20)
    body = gzipped_zeros(48 << 20) if encoding == "gzip" else bytes(2 << 20)
    hub.answers["GET", API] = say(200, body, Content_Encoding=encoding)
    tracemalloc.start()
    try:
        with pytest.raises(DownloadFailed, match="longer than 1,048,576 bytes"):
            resolve(REPO)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_an_answer_that_never_ends_is_bounded(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MAX_ANSWER_BYTES", 1 << 20)
    hub.answers["GET", API] = flood(OK + b"\r\n")
    with pytest.raises(DownloadFailed, match="longer than 1,048,576 bytes"):
        resolve(REPO)


def compressed(body: bytes) -> Answer:
    sha1 = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return say(200, gzip.compress(body), Content_Encoding="gzip", ETag=f'"{sha1}"')


def test_compression_that_nobody_wanted_is_undone(hub: LocalHub) -> None:
    hub.answers["GET", FILE] = compressed(SMALL["config.json"])
    assert contents(resolve(REPO)) == MODEL


def test_a_file_that_expands_beyond_its_size_fills_no_disk(hub: LocalHub, tmp_path: Path) -> None:
    hub.answers["GET", FILE] = say(200, gzipped_zeros(8 << 20), Content_Encoding="gzip")
    with pytest.raises(DownloadFailed, match="more than the 25 bytes it announced"):
        resolve(REPO)
    assert sum(path.stat().st_size for path in tmp_path.glob("hf/hub/*/blobs/*")) < 1000


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (b"{}", "br", "compresses with 'br'"),
        (b"{}", "gzip", "gzip is broken"),
        (gzip.compress(b"{}")[:-9], "gzip", "gzip is cut"),
    ],
)
def test_compression_that_is_unknown_or_broken_is_refused(
    hub: LocalHub, body: bytes, encoding: str, message: str
) -> None:
    hub.answers["GET", API] = say(200, body, Content_Encoding=encoding)
    with pytest.raises(DownloadFailed, match=message):
        resolve(REPO)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", 16 << 20),
        ("generation_config.json", 16 << 20),
        ("tokenizer_config.json", 16 << 20),
        ("special_tokens_map.json", 16 << 20),
        ("added_tokens.json", 16 << 20),
        ("chat_template.jinja", 16 << 20),
        ("tokenizer.json", 64 << 20),
        ("model.safetensors.index.json", 64 << 20),
    ],
)
def test_a_file_that_announces_more_than_any_reader_takes_is_not_fetched(
    hub: LocalHub, name: str, limit: int
) -> None:
    if name.endswith("index.json"):
        hub.repos[REPO] = {**SMALL, name: b"{}"}
    hub.answers["HEAD", "/" + name] = say(200, Content_Length=str(limit + 1), ETag=f'"{"0" * 40}"')
    with pytest.raises(InvalidCheckpoint, match=rf"{name} of .* expected at most {limit:,}"):
        resolve(REPO)
    assert not hub.seen("GET", name)


@pytest.mark.parametrize("size", [None, "-1"])
def test_a_file_of_unknown_size_is_refused(hub: LocalHub, size: str | None) -> None:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", f'"{"0" * 40}"')
        if size is not None:
            handler.send_header("X-Linked-Size", size)
        handler.end_headers()

    hub.answers["HEAD", FILE] = answer
    with pytest.raises(DownloadFailed, match="no known size"):
        resolve(REPO)


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b'{"sha": 3, "siblings": []}',
        b'{"sha": "%s"}' % COMMIT.encode(),
        b'{"sha": "%s", "siblings": 3}' % COMMIT.encode(),
        b'{"sha": "%s", "siblings": [{"name": 3}]}' % COMMIT.encode(),
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_list_of_another_shape_is_refused(hub: LocalHub, body: bytes) -> None:
    hub.answers["GET", API] = say(200, body)
    with pytest.raises(DownloadFailed):
        resolve(REPO)


def test_a_message_is_short_whatever_the_list_holds(hub: LocalHub) -> None:
    hub.repos[REPO] = {f"{i}{'x' * 500}": b"" for i in range(1000)}
    with pytest.raises(InvalidCheckpoint, match="it holds 1000 files") as caught:
        resolve(REPO)
    assert len(str(caught.value)) < 3000


def test_an_index_of_countless_shards_is_refused(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "MAX_SHARDS", 2)
    names = ", ".join(f'"{i}": "model-{i}.safetensors"' for i in range(3))
    index = b'{"weight_map": {%s}}' % names.encode()
    hub.repos[REPO] = {**SMALL, "model.safetensors.index.json": index}
    with pytest.raises(InvalidCheckpoint, match=r"index\.json is broken"):
        resolve(REPO)


@pytest.mark.parametrize("content_range", ["bytes 0-1/2", "bytes 99-40959/40960", "nonsense", ""])
def test_a_part_of_another_place_is_not_appended(
    hub: LocalHub, tmp_path: Path, content_range: str
) -> None:
    blobs = tmp_path / "hf/hub/models--someone--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete").write_bytes(WEIGHTS[:1000])

    def wrong_part(handler: Handler) -> None:
        hub.answers.clear()
        handler.answer(206, WEIGHTS[:5000], Content_Range=content_range)

    hub.answers["GET", BYTES] = wrong_part
    assert contents(resolve(REPO)) == MODEL
    assert "range" not in hub.seen("GET", BYTES)[-1]


# Links


PARTIAL = f"hf/hub/models--someone--tiny/blobs/{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside the cache, which no download may change."""
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    return path


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe"])
def test_what_stands_in_place_of_a_partial_file_is_not_written_to(
    hub: LocalHub, tmp_path: Path, victim: Path, kind: str
) -> None:
    partial = tmp_path / PARTIAL
    partial.parent.mkdir(parents=True)
    if kind == "link":
        partial.symlink_to(victim)
    elif kind == "dangling link":
        partial.symlink_to(tmp_path / "new")
    elif kind == "hard link":
        partial.hardlink_to(victim)
    else:
        os.mkfifo(partial)
    assert contents(resolve(REPO)) == MODEL
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()
    assert not partial.is_symlink()


def test_a_link_that_is_made_just_before_the_file_is_opened_is_not_followed(
    hub: LocalHub, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def replace_by_link(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path == tmp_path / PARTIAL:
            path.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", replace_by_link)
    with pytest.raises(DownloadFailed, match="cannot store"):
        resolve(REPO)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name",
    [
        ".locks",
        ".locks/models--someone--tiny",
        "models--someone--tiny",
        "models--someone--tiny/blobs",
        "models--someone--tiny/snapshots",
        f"models--someone--tiny/snapshots/{COMMIT}",
        "models--someone--tiny/refs",
    ],
)
def test_nothing_is_written_through_a_folder_that_leads_out_of_the_cache(
    hub: LocalHub, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "hf/hub" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(DownloadFailed, match=r"out of the cache .*HF_HOME"):
        resolve(REPO)
    assert list(outside.iterdir()) == []


def test_a_record_of_missing_files_is_not_written_through_a_link(
    hub: LocalHub, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "hf/hub/models--someone--tiny/.no_exist"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    del hub.repos[REPO]["added_tokens.json"]
    resolve(REPO)
    assert list(outside.iterdir()) == []


def test_the_cache_itself_may_be_a_link(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "large disk")
    assert contents(resolve(REPO)) == MODEL
    assert (tmp_path / "large disk" / "hub" / "models--someone--tiny").is_dir()


def test_a_lock_that_is_a_link_empties_no_file(hub: LocalHub, tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "hf/hub/.locks/models--someone--tiny"
    folder.mkdir(parents=True)
    (folder / f"{hashlib.sha256(WEIGHTS).hexdigest()}.lock").symlink_to(victim)
    assert contents(resolve(REPO)) == MODEL
    assert victim.read_bytes() == b"precious"


def test_a_ref_that_is_a_link_is_replaced(hub: LocalHub, tmp_path: Path, victim: Path) -> None:
    ref = tmp_path / "hf/hub/models--someone--tiny/refs/main"
    ref.parent.mkdir(parents=True)
    ref.symlink_to(victim)
    assert contents(resolve(REPO)) == MODEL
    assert victim.read_bytes() == b"precious"
    assert ref.read_text() == COMMIT


@pytest.mark.parametrize("where", ["blob", "snapshot"])
def test_a_corrupt_file_outside_the_cache_is_not_removed(
    hub: LocalHub, tmp_path: Path, where: str
) -> None:
    """Only the cache's own link to it is."""
    folder = resolve(REPO)
    blob = (folder / "model.safetensors").resolve()
    outside = tmp_path / blob.name
    outside.write_bytes(b"precious")
    link = blob if where == "blob" else folder / "model.safetensors"
    link.unlink()
    link.symlink_to(outside)
    shutil.rmtree(tmp_path / "home")  # the stamps
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    assert outside.read_bytes() == b"precious"
    if where == "blob":
        assert contents(resolve(REPO)) == MODEL
