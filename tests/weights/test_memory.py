"""A mapped file is copied into memory in the background: same bytes, same address at all times."""

from __future__ import annotations

import errno
import os
import re
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import InvalidArtifact
from hybrid.kernels import _native
from hybrid.weights import memory
from hybrid.weights.memory import (
    BackgroundCheck,
    BackgroundCopy,
    Checksums,
    FileChanged,
    FileDamaged,
    Span,
    copy_in_background,
)

PART = 2 << 20
N_BYTES = 5 * PART + 12345
OFFSET = 64


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(0).integers(0, 256, OFFSET + N_BYTES, np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "MOVE_BYTES", PART)
    path = tmp_path / "weights"
    path.write_bytes(data)
    with path.open("rb") as file:
        try:
            _native.map_file(file.fileno(), 1)
        except OSError as error:
            pytest.skip(f"not on this system: {error}")
    return path


def sums(path: Path, data: bytes) -> Checksums:
    """Return the checksums of sound data, in spans of odd sizes."""
    ends = [10, 64_000, PART + 1, 3 * PART, 3 * PART + 100, N_BYTES]
    spans = []
    for first, end in zip([0, *ends], ends, strict=False):
        crc = zlib.crc32(data[OFFSET + first : OFFSET + end])
        spans.append(Span(f"to {end}", first, end, crc))
    return Checksums(path, tuple(spans))


def backing(array: np.ndarray) -> set[str]:
    """Return the files that an array is mapped from; "" stands for anonymous memory."""
    first, last = array.ctypes.data, array.ctypes.data + array.size
    files = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match(r"(\w+)-(\w+) \S+ \S+ \S+ \d+ *(.*)", line)
        if int(match[1], 16) < last and int(match[2], 16) > first:
            files.add(match[3])
    return files


def test_the_bytes_stay_where_they_are(path, data):
    copying = BackgroundCopy(path, OFFSET, sums(path, data))
    address = copying.buffer.ctypes.data
    expected = np.frombuffer(data, np.uint8)[OFFSET:]
    np.testing.assert_array_equal(copying.buffer, expected)
    copying.wait()
    assert not copying.is_mapped
    assert not copying.is_copying
    assert copying.notices == ()
    assert copying.buffer.ctypes.data == address
    assert backing(copying.buffer) == {""}
    path.write_bytes(b"")  # nothing is read from it any more
    np.testing.assert_array_equal(copying.buffer, expected)


def test_readers_see_the_same_bytes_during_the_copy(path, data):
    expected = np.frombuffer(data, np.uint8)[OFFSET:]
    for _ in range(20):
        copying = BackgroundCopy(path, OFFSET, sums(path, data))
        wrong: list[int] = []

        def read(copying=copying, wrong=wrong) -> None:
            while copying.is_mapped:
                wrong.append(int((copying.buffer != expected).sum()))

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(wrong)


def test_stopping_leaves_the_rest_mapped(path, data, monkeypatch):
    at_work, go_on = threading.Event(), threading.Event()

    def wait(mapped, first, n_bytes, file):
        at_work.set()
        go_on.wait()

    monkeypatch.setattr(memory._native, "move_into_memory", wait)
    copying = BackgroundCopy(path, OFFSET, sums(path, data))
    at_work.wait()
    assert copying.is_copying
    threading.Timer(0.05, go_on.set).start()
    copying.stop()
    assert copying.is_mapped
    assert backing(copying.buffer) == {str(path)}
    np.testing.assert_array_equal(copying.buffer, np.frombuffer(data, np.uint8)[OFFSET:])


def test_too_little_memory_leaves_the_rest_mapped_and_is_reported(path, data, monkeypatch):
    move = _native.move_into_memory

    def fail_at_the_third(mapped, first, n_bytes, file):
        if first == 2 * PART:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        move(mapped, first, n_bytes, file)

    monkeypatch.setattr(memory._native, "move_into_memory", fail_at_the_third)
    copying = BackgroundCopy(path, OFFSET, sums(path, data))
    copying.wait()
    assert copying.is_mapped
    assert os.strerror(errno.ENOMEM) in copying.notices[0]
    assert backing(copying.buffer) == {"", str(path)}
    np.testing.assert_array_equal(copying.buffer, np.frombuffer(data, np.uint8)[OFFSET:])


def test_a_shorter_file_is_refused(path, data):
    checksums = sums(path, data)
    os.truncate(path, OFFSET + N_BYTES - 1)
    with pytest.raises(FileChanged):
        BackgroundCopy(path, OFFSET, checksums)


@pytest.mark.parametrize("at", [0, 70_000, PART, 3 * PART + 5, N_BYTES - 1])
def test_one_flipped_bit_is_found_whichever_way_the_bytes_come(path, data, at):
    checksums = sums(path, data)
    damaged = bytearray(data)
    damaged[OFFSET + at] ^= 16
    path.write_bytes(damaged)
    name = next(span.name for span in checksums.spans if at < span.end)
    with pytest.raises(FileDamaged, match=f"'{name}' are damaged"):
        memory.read_file(path, OFFSET, checksums, 2)
    for make in (lambda *at: memory.map_file(*at)[1], BackgroundCopy):
        path.write_bytes(damaged)
        background = make(path, OFFSET, checksums)
        background.wait()
        with pytest.raises(InvalidArtifact, match=f"'{name}' are damaged"):
            background.raise_damage()
        assert not path.exists()  # the next load packs the model again


def test_a_mapped_file_that_is_sound_passes_and_may_shrink_meanwhile(path, data):
    checksums = sums(path, data)
    _, check = memory.map_file(path, OFFSET, checksums)
    check.wait()
    check.raise_damage()
    assert check.is_mapped
    assert not check.is_copying
    file = path.open("rb")
    os.truncate(path, PART)
    cut = BackgroundCheck(file, OFFSET, checksums)
    cut.wait()
    with pytest.raises(InvalidArtifact, match="are damaged"):
        cut.raise_damage()


def test_the_background_leaves_the_first_prompt_alone_until_it_is_waited_for(
    path, data, monkeypatch
):
    monkeypatch.setattr(memory, "BACKGROUND_DELAY_S", 1000.0)
    begun = threading.Event()
    move = memory._native.move_into_memory

    def moved(*arguments):
        begun.set()
        move(*arguments)

    monkeypatch.setattr(memory._native, "move_into_memory", moved)
    background = BackgroundCopy(path, OFFSET, sums(path, data))
    assert background.is_copying
    assert not begun.wait(0.05)
    np.testing.assert_array_equal(background.buffer, np.frombuffer(data, np.uint8)[OFFSET:])
    assert background.wait()
    assert begun.is_set()
    assert not background.is_mapped
    stopped = BackgroundCopy(path, OFFSET, sums(path, data))
    stopped.stop()
    assert stopped.is_mapped


def test_what_cannot_be_checked_does_not_count_as_sound(path, data, monkeypatch):
    def fail(part, crc=0):
        raise MemoryError

    monkeypatch.setattr(memory._native, "crc32", fail)
    for background in (
        memory.map_file(path, OFFSET, sums(path, data))[1],
        BackgroundCopy(path, OFFSET, sums(path, data)),
    ):
        background.wait()
        with pytest.raises(InvalidArtifact, match="could not be checked: MemoryError"):
            background.raise_damage()


@pytest.mark.parametrize("portable", [False, True])
def test_checksums_are_those_of_zlib(portable):
    rng = np.random.default_rng(0)
    for n_bytes in [*range(300), 4095, 4096, 100_001]:
        some = rng.integers(0, 256, n_bytes, np.uint8)
        for crc in (0, 1, 0xDEADBEEF):
            assert _native.crc32(some, crc, portable) == zlib.crc32(some.tobytes(), crc)


def test_a_file_that_shrinks_is_an_error(path):
    with path.open("rb") as file:
        mapped = _native.map_file(file.fileno(), OFFSET + N_BYTES)
        os.truncate(path, PART + 1)
        _native.move_into_memory(mapped, 0, PART, file.fileno())
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
            _native.move_into_memory(mapped, PART, PART, file.fileno())


@pytest.mark.parametrize(("first", "n_bytes"), [(1, 10), (-PART, PART), (0, 0), (0, N_BYTES * 2)])
def test_bad_parts_of_the_mapping_are_refused(path, first, n_bytes):
    with path.open("rb") as file:
        mapped = _native.map_file(file.fileno(), OFFSET + N_BYTES)
        with pytest.raises(ValueError, match="part of the mapping"):
            _native.move_into_memory(mapped, first, n_bytes, file.fileno())


def test_a_system_that_cannot_map_the_file_reads_it(path, data, monkeypatch):
    def refuse(file, n_bytes):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(memory._native, "map_file", refuse)
    buffer = copy_in_background(path, OFFSET, sums(path, data), 2)
    assert isinstance(buffer, np.ndarray)
    np.testing.assert_array_equal(buffer, np.frombuffer(data, np.uint8)[OFFSET:])
