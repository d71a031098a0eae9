"""A model's hash covers all bytes of its weights, and is computed once for each state of a file."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tiny_models import write_model

from hybrid import limits
from hybrid.checkpoint import hf, identity
from hybrid.errors import InvalidCheckpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CHUNK_BYTES", 50_000)  # many chunks, the last one shorter
    monkeypatch.setattr(identity, "SETTLED_NS", -1)


def hash_of(model: Path, memory: Path | None = None) -> str:
    with hf.open_checkpoint(model, hashes=memory) as checkpoint:
        return checkpoint.weights_hash


def interrupt_after(event: threading.Event) -> None:
    event.wait()
    raise KeyboardInterrupt


def refuse_to_read(*args: object) -> str:
    raise AssertionError("the file is hashed again")


def test_every_byte_counts(model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    seen = {hash_of(model)}
    n_header = 8 + int.from_bytes(data[:8], "little")
    for place in (*range(n_header, len(data), 99_991), len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        before = len(seen)
        seen.add(hash_of(model))
        assert len(seen) == before + 1


def test_the_hash_depends_on_neither_folder_nor_times_nor_chunks_threads(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert hash_of(copy) == hash_of(model)


def test_a_hash_is_remembered_until_the_file_changes(model, tmp_path, monkeypatch):
    memory, path = tmp_path / "hashes", model / "model.safetensors"
    first = hash_of(model, memory)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "hash_content", refuse_to_read)
        assert hash_of(model, memory) == first
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    other = hash_of(model, memory)
    assert other != first
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))  # the same size and time of modification as the other content
    assert hash_of(model, memory) == first


def test_a_fresh_file_is_not_remembered(model, tmp_path, monkeypatch):
    """It may change again without another time of change."""
    monkeypatch.setattr(identity, "SETTLED_NS", 3600 * 10**9)
    hash_of(model, tmp_path / "hashes")
    assert not (tmp_path / "hashes").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 200_000, b"null", b'{"version": 1}', b"\xff", b"x" * 10_000]
)
def test_a_broken_memory_is_ignored(model, tmp_path, content):
    memory = tmp_path / "hashes"
    expected = hash_of(model, memory)
    (kept,) = memory.iterdir()
    kept.write_bytes(content)
    assert hash_of(model, memory) == expected
    assert json.loads(kept.read_bytes())["version"] == 1


def test_a_memory_that_cannot_be_written_is_no_error(model, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert hash_of(model, tmp_path / "file") == hash_of(model)


@pytest.mark.parametrize("how", ["replaced", "changed", "removed"])
def test_files_that_change_after_opening_are_refused(model, tmp_path, how):
    path = model / "model.safetensors"
    data = path.read_bytes()
    with hf.open_checkpoint(model) as checkpoint:
        if how == "replaced":
            (model / "new").write_bytes(data)
            (model / "new").replace(path)
        elif how == "changed":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        else:
            path.unlink()
        with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
            _ = checkpoint.weights_hash


def test_hashing_in_the_background_stops_with_an_error_of_the_body(model, monkeypatch):
    at_work = threading.Event()
    hash_content = identity.hash_content

    def wait_for_stop(descriptor: int, n_bytes: int, stops: threading.Event) -> str:
        at_work.set()
        stops.wait()
        return hash_content(descriptor, n_bytes, stops)

    with hf.open_checkpoint(model) as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(identity, "hash_content", wait_for_stop)
            with pytest.raises(KeyboardInterrupt), checkpoint.identity.hashing():
                interrupt_after(at_work)
        assert checkpoint.weights_hash == hash_of(model)


def test_hashing_in_the_background_gives_the_same_hash(model):
    with hf.open_checkpoint(model) as checkpoint:
        with checkpoint.identity.hashing():
            pass
        assert checkpoint.weights_hash == hash_of(model)


@pytest.mark.parametrize("is_known", [False, True])
def test_files_that_change_during_the_body_are_noticed(model, tmp_path, is_known):
    with hf.open_checkpoint(model, hashes=tmp_path / "hashes") as checkpoint:
        if is_known:
            _ = checkpoint.weights_hash
        with (
            pytest.raises(InvalidCheckpoint, match="changed or replaced while it was read"),
            checkpoint.identity.hashing(),
        ):
            os.utime(model / "model.safetensors")


def test_an_interrupted_wait_for_the_hash_does_not_wait_for_all_of_it(model, monkeypatch):
    has_stopped = threading.Event()

    def never_ends(descriptor: int, n_bytes: int, stops: threading.Event) -> str:
        if stops.wait(60):
            has_stopped.set()
        raise identity._Stopped

    def interrupted(future: Future[str], timeout: float | None = None) -> str:
        raise KeyboardInterrupt

    with hf.open_checkpoint(model) as checkpoint, monkeypatch.context() as patch:
        patch.setattr(identity, "hash_content", never_ends)
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt), checkpoint.identity.hashing():
            pass
        assert has_stopped.is_set()
        patch.undo()
        assert checkpoint.weights_hash == hash_of(model)


def test_a_system_without_further_threads_hashes_all_the_same(model, no_threads):
    with hf.open_checkpoint(model) as checkpoint:
        with checkpoint.identity.hashing():
            pass
        found = checkpoint.weights_hash
    no_threads.undo()
    assert found == hash_of(model)


def test_fields_that_decide_no_weights_do_not_count(model):
    with hf.open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    described = identity._describe(config)
    assert described == identity._describe(replace(config, bos_id=None, eos_ids=(7,)))
    assert described != identity._describe(replace(config, rope_theta=config.rope_theta * 2))


def test_a_new_field_at_its_default_does_not_change_the_hash():
    @dataclass(frozen=True)
    class Config:
        n_layers: int = field()
        later: float = 1.0
        names: tuple[str, ...] = field(default_factory=tuple)

    assert json.loads(identity._describe(Config(3))) == {"n_layers": 3}
    assert json.loads(identity._describe(Config(3, 2.0))) == {"n_layers": 3, "later": 2.0}


@pytest.mark.parametrize(("quota", "n_threads"), [(1.0, 1), (2.5, 2), (math.inf, 3)])
def test_the_processor_quota_bounds_the_hashing_threads(model, monkeypatch, quota, n_threads):
    found = []

    def recorded(function, items, n_threads):
        found.append(n_threads)
        return map(function, items)

    monkeypatch.setattr(identity, "map_on_threads", recorded)
    monkeypatch.setattr(limits, "allowed_cores", lambda: 3)
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota)
    hash_of(model)
    assert found == [n_threads]
