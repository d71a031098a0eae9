"""A model's name leads to a checked folder, which is downloaded if it is not on this machine.

A server on this machine imitates the Hugging Face Hub. It serves small files with git's SHA-1 as
their etag. It redirects large files to another host, with their SHA-256 in `X-Linked-Etag`.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils
import pytest
from huggingface_hub import constants, file_download

from hybrid.errors import (
    DownloadFailed,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
)
from hybrid.hub.catalog import catalog, hybrid_home, resolve

COMMIT = "c0ffee" * 6 + "c0ff"
CHUNK = 4096  # bytes that huggingface_hub writes at a time in these tests
REPO = "someone/tiny"
MINICPM = "openbmb/MiniCPM-S-1B-sft"

SMALL = {
    "config.json": b'{"model_type": "minicpm"}',
    "generation_config.json": b'{"temperature": 0.8}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
}
UNWANTED = {
    "README.md": b"# tiny",
    "modeling_minicpm.py": b"raise SystemExit",
    "tiny.Q4_0.gguf": b"GGUF",
    "consolidated.safetensors": b"the same once more",
}
resumes_a_cut_connection = pytest.mark.skipif(
    "RemoteProtocolError" not in inspect.getsource(file_download.http_get),
    reason="this version of huggingface_hub resumes a cut connection only in the next run",
)
WEIGHTS = bytes(i * i % 251 for i in range(10 * CHUNK))


class LocalHub(ThreadingHTTPServer):
    """Repositories (name -> file -> bytes), the requests that it saw, and faults on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.status: dict[str, int] = {}  # part of a path -> the status it answers
        self.cut_after: int | None = None  # close the next large download after this many bytes
        self.down_after_cut = False
        self.flip = False  # send large files with their first byte changed

    def seen(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path contains `part`."""
        return [headers for m, path, headers in self.requests if m == method and part in path]


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, path, headers))
        for part, status in hub.status.items():
            if part in path:
                return self.answer(status)
        owner, name, *rest = path.removeprefix("/api/models").removeprefix("/cdn").split("/")[1:]
        files = hub.repos.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models"):
            return self.list_files(f"{owner}/{name}", files)
        body = files[rest[-1]]
        if path.startswith("/cdn"):
            return self.send_large(body)
        sha256 = hashlib.sha256(body).hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        if not rest[-1].endswith((".safetensors", ".bin")):
            return self.answer(200, body, ETag=f'"{sha1}"', X_Repo_Commit=COMMIT)
        return self.answer(
            302,
            Location=f"http://localhost:{hub.server_port}/cdn/{owner}/{name}/{rest[-1]}",
            X_Linked_Etag=f'"{sha256}"',
            X_Linked_Size=str(len(body)),
            X_Repo_Commit=COMMIT,
        )

    do_HEAD = do_GET

    def list_files(self, repo_id: str, files: dict[str, bytes]) -> None:
        names = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "sha": COMMIT, "private": False, "siblings": names}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_large(self, body: bytes) -> None:
        hub = self.server
        first = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        rest = body[first:]
        if hub.flip and first == 0:
            rest = bytes([body[0] ^ 1]) + body[1:]
        cut, hub.cut_after = hub.cut_after, None
        if cut is not None and hub.down_after_cut:
            hub.status["/cdn"] = 503
        self.answer(
            206 if first else 200,
            rest[:cut],
            Content_Length=str(len(rest)),
            Content_Range=f"bytes {first}-{len(body) - 1}/{len(body)}",
        )


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
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    close = getattr(huggingface_hub.utils, "close_session", None)  # since huggingface_hub 1.0
    if close:
        close()
    server.shutdown()
    thread.join()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil(file: Path) -> None:
    """Change a file's bytes and date it well after its stamp, whatever the clock's resolution."""
    file.write_bytes(b"spoiled")
    os.utime(file, (2e9, 2e9))


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("hf/hub/models--*/blobs/*"))


# Fetching


def test_a_repository_is_fetched_without_the_files_that_no_model_needs(hub: LocalHub) -> None:
    assert contents(resolve(REPO)) == {**SMALL, "model.safetensors": WEIGHTS}
    for name in UNWANTED:
        assert not hub.seen("GET", name)
        assert not hub.seen("HEAD", name)


def test_a_complete_copy_costs_no_request(hub: LocalHub) -> None:
    first = resolve(REPO)
    hub.requests.clear()
    assert resolve(REPO) == first
    assert resolve(REPO, offline=True) == first
    assert hub.requests == []


def test_a_copy_fetched_by_huggingface_hub_is_taken_and_checked(
    hub: LocalHub, tmp_path: Path
) -> None:
    for name in [*SMALL, "model.safetensors"]:
        file = huggingface_hub.hf_hub_download(REPO, name)
    hub.requests.clear()
    assert resolve(REPO) == Path(file).parent
    assert hub.requests == []
    assert len(list((tmp_path / "home" / "verified").iterdir())) == 6


def test_a_copy_fetched_here_is_taken_by_huggingface_hub(hub: LocalHub) -> None:
    folder = resolve(REPO)
    file = huggingface_hub.hf_hub_download(REPO, "model.safetensors", local_files_only=True)
    assert Path(file) == folder / "model.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_shards_are_those_that_the_index_names(hub: LocalHub, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {"a": f"{stem}-1.{suffix}", "b": f"{stem}-2.{suffix}", "c": f"{stem}-1.{suffix}"}
    files = {
        **SMALL,
        f"{stem}.{suffix}.index.json": json.dumps({"weight_map": weight_map}).encode(),
        f"{stem}-1.{suffix}": b"one",
        f"{stem}-2.{suffix}": b"two",
    }
    hub.repos[REPO] = {**files, **UNWANTED, f"{stem}-3.{suffix}": b"left over"}
    folder = resolve(REPO)
    assert contents(folder) == files

    spoil((folder / f"{stem}-2.{suffix}").resolve())
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    with pytest.raises(ModelNotFound, match=rf"{stem}-2\.{suffix}"):
        resolve(REPO, offline=True)
    assert contents(resolve(REPO)) == files


def test_safetensors_are_preferred_and_bin_is_the_fallback(hub: LocalHub) -> None:
    hub.repos["someone/both"] = {**hub.repos[REPO], "pytorch_model.bin": b"pickle"}
    assert "pytorch_model.bin" not in contents(resolve("someone/both"))
    hub.repos["someone/bin"] = {**SMALL, "pytorch_model.bin": b"pickle"}
    assert contents(resolve("someone/bin"))["pytorch_model.bin"] == b"pickle"


def test_a_catalog_name_is_fetched_from_its_repository(hub: LocalHub) -> None:
    hub.repos[MINICPM] = hub.repos[REPO]
    assert resolve("minicpm-s-1b") == resolve("MiniCPM-S-1B") == resolve(MINICPM)


def test_the_token_goes_to_the_hub_and_not_to_the_host_of_the_bytes(hub: LocalHub) -> None:
    resolve(REPO)
    assert hub.seen("GET", "/api/models")[0]["authorization"] == "Bearer secret"
    (headers,) = hub.seen("GET", "/cdn")
    assert "authorization" not in headers
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "weight_map", [b"[]", b"{}", b"\xff", b'{"weight_map": {"a": "../../evil.bin"}}', b"[" * 99999]
)
def test_a_broken_index_is_refused(hub: LocalHub, weight_map: bytes) -> None:
    hub.repos[REPO] = {**SMALL, "model.safetensors.index.json": weight_map}
    with pytest.raises(InvalidCheckpoint, match=r"index\.json is broken"):
        resolve(REPO)


def test_an_index_that_names_a_shard_which_is_not_there_is_refused(hub: LocalHub) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors"}}'
    hub.repos[REPO] = {**SMALL, "model.safetensors.index.json": index}
    with pytest.raises(InvalidCheckpoint, match=r"lacks model-1\.safetensors"):
        resolve(REPO)


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repository_that_holds_no_whole_model_is_refused(hub: LocalHub, lacking: str) -> None:
    del hub.repos[REPO][lacking]
    with pytest.raises(InvalidCheckpoint, match=lacking):
        resolve(REPO)
    assert not hub.seen("GET", "/resolve/")


# Interruptions, corruption, concurrency


@resumes_a_cut_connection
def test_a_cut_connection_is_resumed(hub: LocalHub) -> None:
    hub.cut_after = 3 * CHUNK
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    assert hub.seen("GET", "/cdn")[-1]["range"] == f"bytes={3 * CHUNK}-"


def test_the_next_run_resumes_an_interrupted_download(hub: LocalHub, tmp_path: Path) -> None:
    hub.cut_after, hub.down_after_cut = 3 * CHUNK, True
    with pytest.raises(DownloadFailed, match=r"model\.safetensors of someone/tiny .*again"):
        resolve(REPO)
    assert sum(name.endswith(".incomplete") for name in blobs(tmp_path)) == 1

    hub.status.clear()
    hub.requests.clear()
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    assert [headers["range"] for headers in hub.seen("GET", "/cdn")] == [f"bytes={3 * CHUNK}-"]
    assert not hub.seen("GET", "config.json")
    assert not any(name.endswith(".incomplete") for name in blobs(tmp_path))


def test_a_partial_file_longer_than_the_whole_is_fetched_anew(
    hub: LocalHub, tmp_path: Path
) -> None:
    name = hashlib.sha256(WEIGHTS).hexdigest() + ".incomplete"
    partial = tmp_path / "hf/hub/models--someone--tiny/blobs" / name
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS + b"and more")
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_server_that_sends_more_than_it_announced_fills_no_disk(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Handler.send_large
    monkeypatch.setattr(
        Handler, "send_large", lambda handler, body: handler.answer(200, body + bytes(100 * CHUNK))
    )
    with pytest.raises(DownloadFailed, match=r"more than the 40,960 bytes it announced"):
        resolve(REPO)
    (partial,) = tmp_path.glob("hf/hub/models--*/blobs/*.incomplete")
    assert partial.stat().st_size <= len(WEIGHTS) + CHUNK
    monkeypatch.setattr(Handler, "send_large", send)
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_ctrl_c_passes_through(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(file_download, "http_get", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(REPO)


def test_corrupt_bytes_are_refused_and_removed(hub: LocalHub, tmp_path: Path) -> None:
    hub.flip = True
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    actual = hashlib.sha256(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]).hexdigest()
    with pytest.raises(DownloadFailed, match=rf"model\.safetensors .*{expected}.*{actual}"):
        resolve(REPO)
    assert not any(name.startswith(expected) for name in blobs(tmp_path))

    hub.flip = False
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cached_file_that_changed_is_refused_and_fetched_anew(hub: LocalHub, name: str) -> None:
    folder = resolve(REPO)
    blob = (folder / name).resolve()
    good = blob.read_bytes()
    spoil(blob)
    with pytest.raises(DownloadFailed, match=name):
        resolve(REPO, offline=True)
    assert not blob.exists()
    assert resolve(REPO) == folder
    assert blob.read_bytes() == good


def test_a_blob_that_was_there_before_the_download_is_checked(
    hub: LocalHub, tmp_path: Path
) -> None:
    blob = tmp_path / "hf/hub/models--someone--tiny/blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"something else")
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_stamped_file_is_not_hashed_again(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(REPO)
    monkeypatch.setattr("hybrid.hub.checksum.digest", lambda path, etag: "hashed")
    resolve(REPO)
    monkeypatch.setenv("HYBRID_HOME", str(hybrid_home() / "another"))
    with pytest.raises(DownloadFailed, match="hashed"):
        resolve(REPO)


def test_a_link_into_a_store_of_shared_blobs_is_checked_by_its_etag(hub: LocalHub) -> None:
    """huggingface_hub 2 may make the blob itself a link to a file of another name."""
    link = resolve(REPO) / "model.safetensors"
    blob = link.parent / link.readlink()
    shared = blob.with_name("f" * 64)
    blob.rename(shared)
    blob.symlink_to(shared.name)
    os.utime(shared, (2e9, 2e9))  # newer than its stamp, so it is hashed again
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    spoil(shared)
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    assert not shared.exists()
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_home_that_cannot_be_written_fails_nothing(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "file"))
    assert resolve(REPO) == resolve(REPO)


def test_a_disk_without_links_holds_plain_files(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    hub.repos[REPO]["tokenizer_config.json"] = SMALL["special_tokens_map.json"]  # one etag, twice
    folder = resolve(REPO)
    assert contents(folder)["model.safetensors"] == WEIGHTS
    assert blobs(tmp_path) == []
    hub.requests.clear()
    assert resolve(REPO) == folder
    assert hub.requests == []


def environment_of(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    """Return the environment of other processes, which the fixture's changes do not reach."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("HF_HUB_CACHE", None)
    return environment


STOP_HALF_WAY = """
import os, signal
from huggingface_hub import constants
from hybrid.hub.catalog import resolve
constants.DOWNLOAD_CHUNK_SIZE = 4096
{before}
resolve("someone/tiny", progress=lambda task, done, total: done > 4 * 4096 and {then})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize(
    ("before", "then", "message"),
    [
        pytest.param("", "os.kill(os.getpid(), signal.SIGKILL)", "", id="killed"),
        pytest.param(
            "signal.signal(signal.SIGINT, signal.default_int_handler)",  # background jobs ignore it
            "os.kill(os.getpid(), signal.SIGINT)",
            "KeyboardInterrupt",
            id="ctrl-c",
        ),
        pytest.param(
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4096, 10**9))",
            "None",
            "cannot store someone/tiny",
            id="disk full",
        ),
    ],
)
def test_after_a_process_ended_half_way_the_next_resumes_its_download(
    hub: LocalHub, tmp_path: Path, before: str, then: str, message: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STOP_HALF_WAY.format(before=before, then=then)],
        env=environment_of(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert message in ended.stderr
    assert not any(name == hashlib.sha256(WEIGHTS).hexdigest() for name in blobs(tmp_path))

    record = Record()
    assert contents(resolve(REPO, progress=record))["model.safetensors"] == WEIGHTS
    assert record.done()[0] >= 2 * CHUNK  # what the process had in its buffer is lost
    assert not any(name.endswith(".incomplete") for name in blobs(tmp_path))


def test_threads_that_want_the_same_model_share_one_download(hub: LocalHub) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(resolve, [REPO] * 4))
    assert contents(folders[0])["model.safetensors"] == WEIGHTS
    assert len(set(folders)) == 1
    assert len(hub.seen("GET", "/cdn")) == 1


@pytest.mark.slow
def test_processes_share_one_download_and_the_environment_is_honoured(
    hub: LocalHub, tmp_path: Path
) -> None:
    environment = environment_of(hub, tmp_path) | {"HF_HOME": str(tmp_path / "elsewhere")}
    script = "from hybrid.hub.catalog import resolve; print(resolve('someone/tiny'))"

    def start(**variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    (first, quiet), (second, _) = [process.communicate() for process in [start(), start()]]
    assert quiet == ""  # no progress bar where stderr is not a terminal
    assert first == second
    assert first.startswith(str(tmp_path / "elsewhere"))
    assert contents(Path(first.strip()))["model.safetensors"] == WEIGHTS
    assert len(hub.seen("GET", "/cdn")) == 1

    hub.requests.clear()
    _, refusal = start(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")).communicate()
    assert "ModelNotFound" in refusal
    assert hub.requests == []


# Progress


class Record:
    """A Progress that records its calls, and checks that 0 <= done <= total in each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, task: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.calls.append((task, done, total))

    def done(self) -> list[int]:
        return [done for _, done, _ in self.calls]


MODEL_BYTES = sum(map(len, SMALL.values())) + len(WEIGHTS)


def test_progress_counts_the_bytes_of_all_files_together(hub: LocalHub) -> None:
    record = Record()
    resolve(REPO, progress=record)
    assert {(task, total) for task, _, total in record.calls} == {("downloading tiny", MODEL_BYTES)}
    assert record.done()[0] == 0
    assert record.done()[-1] == MODEL_BYTES
    assert record.done() == sorted(set(record.done()))  # each call reports progress
    assert len(record.calls) >= len(SMALL) + len(WEIGHTS) // CHUNK

    record = Record()
    resolve(REPO, progress=record)
    assert record.calls == []  # nothing is fetched, so nothing is reported


def test_progress_knows_the_shards_from_the_beginning(hub: LocalHub) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.bin", "b": "model-2.bin"}}).encode()
    files = {**SMALL, "pytorch_model.bin.index.json": index}
    hub.repos[REPO] = {**files, "model-1.bin": WEIGHTS, "model-2.bin": WEIGHTS[:-5]}
    record = Record()
    resolve(REPO, progress=record)
    total = sum(map(len, hub.repos[REPO].values()))
    assert {total for _, _, total in record.calls} == {total}
    assert record.done()[0] == len(index)  # it is read first: it names the shards
    assert record.done()[-1] == total
    assert len(hub.seen("GET", "index.json")) == 1


def test_progress_of_the_next_run_begins_with_what_is_there(hub: LocalHub) -> None:
    hub.cut_after, hub.down_after_cut = 3 * CHUNK, True
    record = Record()
    with pytest.raises(DownloadFailed):
        resolve(REPO, progress=record)
    here = sum(map(len, SMALL.values())) + 3 * CHUNK
    assert record.done()[-1] == here

    hub.status.clear()
    record = Record()
    resolve(REPO, progress=record)
    assert (record.done()[0], record.done()[-1]) == (here, MODEL_BYTES)
    assert record.done() == sorted(record.done())


@resumes_a_cut_connection
def test_progress_counts_no_byte_twice_if_a_connection_is_resumed(hub: LocalHub) -> None:
    hub.cut_after = 3 * CHUNK
    record = Record()
    resolve(REPO, progress=record)
    assert record.done() == sorted(set(record.done()))
    assert record.done()[-1] == MODEL_BYTES


def test_progress_stays_within_the_total_if_a_server_cannot_resume(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of huggingface_hub then start again; others append the file, which fails."""
    partial = tmp_path / "hf/hub/models--someone--tiny/blobs"
    partial.mkdir(parents=True)
    (partial / (hashlib.sha256(WEIGHTS).hexdigest() + ".incomplete")).write_bytes(WEIGHTS[:CHUNK])
    monkeypatch.setattr(Handler, "send_large", lambda handler, body: handler.answer(200, body))
    record = Record()
    try:
        resolve(REPO, progress=record)
    except DownloadFailed:
        resolve(REPO, progress=record)
    assert record.done()[-1] == MODEL_BYTES


def test_progress_that_finds_the_files_of_another_program_is_complete_at_once(
    hub: LocalHub, tmp_path: Path
) -> None:
    folder = resolve(REPO)
    (folder.parent.parent / "refs" / "main").unlink()
    record = Record()
    assert resolve(REPO, progress=record) == folder
    assert record.done() == [MODEL_BYTES]


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "mine too")])
@pytest.mark.parametrize("at", [0, 2 * CHUNK])
def test_what_progress_raises_passes_through_and_the_bytes_stay(
    hub: LocalHub, tmp_path: Path, error: Exception, at: int
) -> None:
    def cancel(task: str, done: int, total: int) -> None:
        if done >= at:
            raise error

    with pytest.raises(type(error)) as caught:
        resolve(REPO, progress=cancel)
    assert caught.value is error
    record = Record()
    assert contents(resolve(REPO, progress=record))["model.safetensors"] == WEIGHTS
    assert record.done()[0] >= at


def test_huggingface_hub_draws_no_bar(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = dict(huggingface_hub.utils.tqdm.__dict__)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # makes huggingface_hub draw anywhere
    huggingface_hub.hf_hub_download(REPO, "README.md")
    assert "README.md" in capsys.readouterr().err  # so this test would see a bar
    resolve(REPO)
    assert capsys.readouterr() == ("", "")
    assert dict(huggingface_hub.utils.tqdm.__dict__) == before


# What the user reads


def test_a_model_that_is_not_here_gives_advice_offline(hub: LocalHub) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve("MiniCPM-S-1B", offline=True)
    assert "hf download openbmb/MiniCPM-S-1B-sft" in str(caught.value)
    assert "-m /path/to/MiniCPM-S-1B-sft" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)
    assert hub.requests == []


def test_a_missing_network_gives_advice(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DownloadFailed) as caught:
        resolve("MiniCPM-S-1B")
    assert "hf download openbmb/MiniCPM-S-1B-sft" in str(caught.value)
    assert "-m /path/to/MiniCPM-S-1B-sft" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_repository_that_the_hub_refuses_is_not_found(hub: LocalHub, status: int) -> None:
    hub.status["/api/models"] = status
    with pytest.raises(ModelNotFound, match=rf"someone/tiny \(HTTP {status}\).*HF_TOKEN"):
        resolve(REPO)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_fails_the_download(hub: LocalHub, status: int) -> None:
    hub.status["/api/models"] = status
    with pytest.raises(DownloadFailed, match=str(status)):
        resolve(REPO)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1:port", "ftp://127.0.0.1"])
def test_a_nonsensical_endpoint_fails_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(DownloadFailed):
        resolve(REPO)


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"{}", b'{"id": "a/b", "sha": "../x"}'])
def test_a_login_page_in_place_of_the_hub_fails_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    monkeypatch.setattr(Handler, "list_files", lambda handler, *_: handler.answer(200, page))
    with pytest.raises(DownloadFailed):
        resolve(REPO)


def test_a_file_without_a_checksum_is_refused(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.hub.download.is_checksum", lambda etag: len(etag) == 64)
    with pytest.raises(DownloadFailed, match=r"config\.json cannot be verified"):
        resolve(REPO)


def test_too_small_a_disk_is_reported_before_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DownloadFailed, match=r"needs 0\.00 GB more"):
        resolve(REPO)
    assert not hub.seen("GET", "/cdn")


def test_a_disk_that_fills_up_is_reported(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", fill)
    with pytest.raises(DownloadFailed, match=r"No space left on device.*Make room"):
        resolve(REPO)


def test_a_cache_that_cannot_be_written_is_reported(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DownloadFailed, match=r"cannot store someone/tiny in .*HF_HOME"):
        resolve(REPO)


# Names


@pytest.fixture
def nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on an attempt to fetch."""

    def refuse(repo_id: str, **options: object) -> Path:
        raise AssertionError(f"fetched {repo_id}")

    monkeypatch.setattr("hybrid.hub.catalog.fetch", refuse)


def test_names_are_unique_and_fractions_are_fractions() -> None:
    assert len({entry.name.casefold() for entry in catalog()}) == len(catalog())
    for entry in catalog():
        fraction = entry.expected_active_fraction
        assert fraction is None or 0 < fraction < 1


@pytest.mark.usefixtures("nobody_calls")
def test_a_catalog_name_wins_over_a_folder_unless_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package" / "models" / "stories").mkdir(parents=True)
    (tmp_path / "stories").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hybrid.hub.catalog.__file__", str(tmp_path / "package" / "hub" / "catalog.py")
    )
    bundled = tmp_path / "package" / "models" / "stories"
    assert resolve("stories") == resolve("Stories") == bundled
    assert resolve("./stories").resolve() == tmp_path / "stories"
    assert resolve(Path("stories")).resolve() == tmp_path / "stories"


def test_an_installation_without_the_bundled_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.hub.catalog.__file__", str(tmp_path / "hub" / "catalog.py"))
    with pytest.raises(ModelNotFound, match="install hybrid again"):
        resolve("stories")


@pytest.mark.usefixtures("nobody_calls")
def test_a_folder_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "$(name) ;模型"
    folder.mkdir(parents=True)
    (tmp_path / "owner" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("~/owner/name") == tmp_path / "owner" / "name"
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("MiniCPM-S1B", "MiniCPM-S-1B"), ("storys", "stories"), ("relullama7b", "ReluLLaMA-7B")],
)
def test_an_unknown_name_suggests_the_closest_and_lists_all(typo: str, meant: str) -> None:
    with pytest.raises(ModelNotFound, match=f"Did you mean '{meant}'") as caught:
        resolve(typo)
    for entry in catalog():
        assert entry.name in str(caught.value)


@pytest.mark.usefixtures("nobody_calls")
@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "\t\n", "\0", "owner/na\0me", "../x/y", "./x", "/no/such/folder", "a/b/c", "a/"),
        *(
            "/a",
            "a//b",
            "a\\b",
            "C:\\models\\x",
            "~/no-such",
            "~no-such-user/x",
            "owner/..",
            "-a/b",
        ),
        *("owner/a--b", "owner/a..b", "owner/a b", "owner/name;rm", "https://huggingface.co/a/b"),
        *("owner/名", "x" * 5000, "a/" + "x" * 97, "\ud800", "owner/name\n"),
    ],
)
def test_what_is_neither_name_nor_folder_nor_repository_is_refused(name: str) -> None:
    with pytest.raises((ModelNotFound, InvalidOption)) as caught:
        resolve(name)
    str(caught.value).encode()  # so it can be printed


@pytest.mark.usefixtures("nobody_calls")
def test_a_path_is_never_a_repository() -> None:
    with pytest.raises(ModelNotFound):
        resolve(Path("someone/tiny"))


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ModelNotFound, match=r"model\.gguf' is a file; expected the folder"
    ) as raised:
        resolve(str(tmp_path / "model.gguf"))
    assert "it is a GGUF model, which llama.cpp runs; get the original model" in str(raised.value)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "'quoted' \"twice\" `id` $(id) & # *\nnext line"
    folder.mkdir()
    for name, target in (("good", folder), ("dangling", tmp_path / "gone"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    assert resolve(str(folder)) == folder
    assert resolve(str(tmp_path / "good")) == tmp_path / "good"
    for name in ("dangling", "loop"):
        with pytest.raises(ModelNotFound, match=f"{name}' is a link to a folder that is not"):
            resolve(str(tmp_path / name))


def test_the_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("HYBRID_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hybrid_home() == Path("/home/someone/.cache/hybrid")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hybrid_home() == Path("/cache/hybrid")
    monkeypatch.setenv("HYBRID_HOME", "~/mine")
    assert hybrid_home() == Path("/home/someone/mine")
    monkeypatch.setenv("HYBRID_HOME", "~no-such-user/mine")
    with pytest.raises(InvalidOption, match="HYBRID_HOME"):
        hybrid_home()


def test_importing_the_catalog_does_not_import_huggingface_hub() -> None:
    script = "import sys, hybrid.hub.catalog; sys.exit('huggingface_hub' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
