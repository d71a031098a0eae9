"""Files of packed models equal what was packed; stale, damaged or partial ones are never used."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny_models import write_model

from hybrid.checkpoint.hf import open_checkpoint
from hybrid.errors import InvalidArtifact, InvalidCheckpoint, OutOfMemory
from hybrid.kernels import Format, _native
from hybrid.progress import ignore_progress
from hybrid.weights import memory, packed_file
from hybrid.weights.layout import packed_layout
from hybrid.weights.packed_file import LoadedModel, Residence, load_packed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "a model; $(x)")


@pytest.fixture(autouse=True)
def keep_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    monkeypatch.setattr(memory, "READ_BYTES", 1000)  # many reads, on any number of threads


def load(model: Path, cache: Path | None, **options) -> LoadedModel:
    with open_checkpoint(model) as checkpoint:
        layout = packed_layout(checkpoint.config, options.pop("format", Format.q8))
        progress = options.pop("progress", ignore_progress)
        residence = Residence(**options)
        return load_packed(checkpoint, layout, cache=cache, residence=residence, progress=progress)


def weights(loaded: LoadedModel) -> np.ndarray:
    """Return every weight of the model, norms and matrices, as it is read back."""
    model = loaded.model
    matrices = [model.embedding, model.head]
    values = [model.norm]
    for layer in model.layers:
        matrices += [layer.qkv, layer.o, layer.gate, layer.up, layer.down]
        values += [layer.attention_norm, layer.ffn_norm]
    values += [_native.dequantize(rows, row) for rows in matrices for row in range(rows.n_rows)]
    return np.concatenate(values)


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@pytest.mark.parametrize("use_mmap", [False, True])
def test_a_model_is_packed_once(model, tmp_path, format, use_mmap):
    cache = tmp_path / "home" / "packed"
    first = load(model, cache, format=format, use_mmap=use_mmap)
    assert first.was_packed
    (name,) = files(cache)
    before = (cache / name).read_bytes()
    again = load(model, cache, format=format, use_mmap=use_mmap, n_threads=3)
    assert not again.was_packed
    assert again.is_mapped == use_mmap
    assert again.notices == ()
    np.testing.assert_array_equal(weights(again), weights(first))
    assert files(cache) == [name]
    assert (cache / name).read_bytes() == before
    other = load(model, cache, format=format, use_mmap=not use_mmap)
    assert not other.was_packed


def test_mapped_copied_and_packed_weights_are_the_same_bytes(model, tmp_path, format):
    mapped = load(model, tmp_path / "a", format=format, use_mmap=True)
    load(model, tmp_path / "b", format=format)
    (a,), (b,) = ((tmp_path / name).glob("*.safetensors") for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert mapped.n_bytes % 64 == 0


def test_threads_do_not_change_a_byte(model, tmp_path, format):
    for n_threads in (1, 4):
        load(model, tmp_path / str(n_threads), format=format, n_threads=n_threads)
    one, four = (next((tmp_path / name).iterdir()).read_bytes() for name in "14")
    assert one == four


def test_a_model_replaced_while_it_is_open_is_not_taken_for_the_new_one(model, tmp_path):
    cache = tmp_path / "cache"
    other = write_model(tmp_path / "other", seed=1)
    with open_checkpoint(model) as checkpoint:
        (other / "model.safetensors").replace(model / "model.safetensors")
        with pytest.raises(InvalidCheckpoint, match="changed or replaced while it was read"):
            load_packed(checkpoint, packed_layout(checkpoint.config, Format.q8), cache=cache)
    assert files(cache) == []
    again = load(model, cache)
    assert again.was_packed
    np.testing.assert_array_equal(weights(again), weights(load(model, None)))


@pytest.mark.parametrize("use_mmap", [False, True])
def test_a_model_that_changes_while_it_is_packed_is_noticed_though_its_hash_is_known(
    model, tmp_path, use_mmap
):
    cache = tmp_path / "cache"
    with open_checkpoint(model) as checkpoint:
        _ = checkpoint.weights_hash
        layout = packed_layout(checkpoint.config, Format.q8)
        with pytest.raises(InvalidCheckpoint, match="changed or replaced while it was read"):
            load_packed(
                checkpoint,
                layout,
                cache=cache,
                residence=Residence(use_mmap),
                progress=lambda *told: os.utime(model / "model.safetensors"),
            )
    assert files(cache) == []


def test_a_cache_that_cannot_be_looked_into_is_a_notice(model, tmp_path):
    """A name too long for the system fails like a folder that may not be entered, also for root."""
    cache = tmp_path / ("x" * 300)
    loaded = load(model, cache)
    (notice,) = loaded.notices
    assert re.search(r"cannot be kept in .* \(File name too long\).*again at each start", notice)
    np.testing.assert_array_equal(weights(loaded), weights(load(model, None)))


@pytest.mark.parametrize(
    "residence", [{}, {"use_mmap": True}, {"use_mlock": True}], ids=["copied", "mapped", "read"]
)
def test_a_system_without_further_threads_loads_all_the_same(
    model, tmp_path, no_threads, residence
):
    cache = tmp_path / "cache"
    packed = load(model, cache, n_threads=4, **residence)
    assert packed.was_packed
    again = load(model, cache, n_threads=4, **residence)
    assert not again.was_packed
    if again.background is not None:
        assert again.background.wait(0)  # checked at once
        again.background.stop()
        assert again.background.damage is None
    np.testing.assert_array_equal(weights(again), weights(packed))


def test_files_that_a_killed_process_left_are_removed(model, tmp_path):
    cache = tmp_path / "cache"
    load(model, cache)
    (path,) = cache.iterdir()
    path.unlink()
    for name, age_s in (("old", 7200), ("new", 0)):
        left = cache / f".{path.stem}.{name}.tmp"
        left.write_bytes(b"x")
        os.utime(left, (time.time() - age_s,) * 2)
    load(model, cache)
    assert files(cache) == sorted([f".{path.stem}.new.tmp", path.name])


def test_weights_that_must_be_mapped_and_cannot_are_an_error(model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutOfMemory, match="cannot be kept"):
        load(model, tmp_path / "cache", use_mmap=True, fits_memory=False)


def test_the_file_is_sound_safetensors(model, tmp_path, format):
    load(model, tmp_path / "cache", format=format)
    (path,) = (tmp_path / "cache").iterdir()
    with open_checkpoint(model) as checkpoint:
        layout = packed_layout(checkpoint.config, format)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {*layout.arrays, "checksums"}
        assert file.metadata()["format"] == format.name
        checksums = file.get_tensor("checksums")
        for name, checksum in zip(layout.arrays, checksums, strict=True):
            assert checksum == zlib.crc32(file.get_tensor(name).tobytes()), name
    n_header = path.stat().st_size - layout.n_bytes - 4 * len(layout.arrays)
    assert n_header % 64 == 0  # the buffer begins at a cache line


def test_small_models_are_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 64 << 20)
    assert load(model, tmp_path / "cache").was_packed
    assert files(tmp_path / "cache") == []
    assert load(model, tmp_path / "cache", use_mmap=True).is_mapped  # mapping needs a file


def test_without_a_cache_nothing_is_kept(model):
    loaded = load(model, None, use_mmap=True)
    assert not loaded.is_mapped
    assert "no file" in loaded.notices[0]


def test_weights_that_do_not_fit_and_cannot_be_kept_are_an_error(model):
    for use_mmap in (True, False):
        with pytest.raises(OutOfMemory, match="HYBRID_HOME"):
            load(model, None, use_mmap=use_mmap, fits_memory=False)


# Stale and damaged files


@pytest.mark.parametrize("use_mmap", [False, True])
def test_changed_weights_are_packed_anew_into_the_same_file(model, tmp_path, use_mmap):
    cache = tmp_path / "cache"
    load(model, cache)
    before = files(cache)
    write_model(model, seed=1)
    changed = load(model, cache, use_mmap=use_mmap)
    assert changed.was_packed
    assert files(cache) == before
    fresh = load(model, None)
    np.testing.assert_array_equal(weights(changed), weights(fresh))


def test_a_changed_config_is_packed_anew(model, tmp_path):
    cache = tmp_path / "cache"
    load(model, cache)
    write_model(model, hidden_act_param=0.2)
    assert load(model, cache).was_packed


def test_the_same_model_elsewhere_has_a_file_of_its_own(model, tmp_path):
    cache = tmp_path / "cache"
    load(model, cache)
    load(Path(shutil.copytree(model, tmp_path / "copy" / model.name)), cache)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("use_mmap", [False, True])
@pytest.mark.parametrize("damage", ["empty", "header", "cut", "longer", "other version", "folder"])
def test_damaged_files_are_replaced(model, tmp_path, damage, use_mmap):
    cache = tmp_path / "cache"
    expected = weights(load(model, cache))
    (path,) = cache.iterdir()
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        changed = {
            "empty": b"",
            "header": data[:100],
            "cut": data[:-1],
            "longer": data + b"x",
            "other version": data.replace(b'"hybrid_packed":"', b'"hybrid_packed":"9', 1)[:-1],
        }
        path.write_bytes(changed[damage])
    loaded = load(model, cache, use_mmap=use_mmap)
    assert loaded.was_packed
    np.testing.assert_array_equal(weights(loaded), expected)
    if damage == "folder":
        assert "cannot be kept" in loaded.notices[0]
        assert files(cache) == [path.name]
    else:
        assert path.read_bytes() == data


@pytest.mark.parametrize("use_mmap", [False, True])
def test_weights_that_change_behind_their_size_and_time_are_packed_anew(model, tmp_path, use_mmap):
    """Package stores set every time to 1, and `cp -p` keeps it."""
    cache, path = tmp_path / "cache", model / "model.safetensors"
    os.utime(path, ns=(1, 1))
    load(model, cache)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    changed = load(model, cache, use_mmap=use_mmap)
    assert changed.was_packed
    np.testing.assert_array_equal(weights(changed), weights(load(model, None)))


def test_weights_whose_time_alone_changes_are_not_packed_anew(model, tmp_path):
    load(model, tmp_path / "cache")
    os.utime(model / "model.safetensors")
    assert not load(model, tmp_path / "cache").was_packed


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def places(model: Path, path: Path) -> dict[str, int]:
    """Return a byte of each array of a packed file, of its padding, header and checksums."""
    with open_checkpoint(model) as checkpoint:
        layout = packed_layout(checkpoint.config, Format.q8)
    size = path.stat().st_size
    first = size - layout.n_bytes - 4 * len(layout.arrays)
    found = {name: first + array.first for name, array in layout.arrays.items()}
    padded = next(array for array in layout.arrays.values() if array.end > array.first + 64)
    return {**found, "header": first - 70, "checksums": size - 1, "last": first + padded.end - 1}


@pytest.mark.parametrize("kept", [{}, {"use_mmap": True}, {"use_mlock": True}], ids=str)
def test_every_flipped_bit_is_found_and_the_file_is_packed_anew(model, tmp_path, kept):
    cache = tmp_path / "cache"
    expected = weights(load(model, cache))
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    for name, place in places(model, path).items():
        flip(path, place)
        loaded = load(model, cache, **kept)
        if not loaded.was_packed:  # found in the background: this load reports, the next packs
            assert loaded.background is not None
            loaded.background.wait()
            with pytest.raises(InvalidArtifact, match=r"damaged: .*load the model again"):
                loaded.background.raise_damage()
            loaded = load(model, cache, **kept)
        assert loaded.was_packed, name
        if loaded.background is not None:
            loaded.background.wait()
            loaded.background.raise_damage()
        np.testing.assert_array_equal(weights(loaded), expected)
        assert path.read_bytes() == sound


def test_damage_that_is_found_at_once_is_told(model, tmp_path):
    cache = tmp_path / "cache"
    load(model, cache)
    (path,) = cache.iterdir()
    flip(path, places(model, path)["0.gate"])
    loaded = load(model, cache, use_mlock=True)
    assert loaded.was_packed
    assert any("'0.gate' are damaged" in notice for notice in loaded.notices)


def test_a_damaged_file_that_cannot_be_removed_is_named(model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load(model, cache)
    (path,) = cache.iterdir()
    flip(path, places(model, path)["1.o"])

    def refuse(self: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    loaded = load(model, cache, use_mmap=True)
    loaded.background.wait()
    with pytest.raises(InvalidArtifact, match=r"'1\.o' are damaged: .*delete the file and load"):
        loaded.background.raise_damage()


def test_a_file_that_shrinks_between_check_and_read_is_packed_anew(model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = weights(load(model, cache))
    (path,) = cache.iterdir()

    read = packed_file._read_checksums

    def read_then_cut(*args) -> memory.Checksums | None:
        checksums = read(*args)
        os.truncate(path, path.stat().st_size // 2)
        return checksums

    monkeypatch.setattr(packed_file, "_read_checksums", read_then_cut)
    loaded = load(model, cache)
    assert loaded.was_packed
    np.testing.assert_array_equal(weights(loaded), expected)


# Disks


@pytest.mark.parametrize("use_mmap", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_gives_a_notice(model, tmp_path, monkeypatch, code, use_mmap):
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    loaded = load(model, tmp_path / "cache", use_mmap=use_mmap)
    assert loaded.was_packed
    assert not loaded.is_mapped
    assert os.strerror(code) in loaded.notices[0]
    assert "HYBRID_HOME" in loaded.notices[0]
    assert files(tmp_path / "cache") == []


def test_a_cache_that_is_not_a_folder_gives_a_notice(model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    loaded = load(model, tmp_path / "cache")
    assert "cannot be kept" in loaded.notices[0]
    assert weights(loaded).size


@pytest.mark.parametrize("use_mmap", [False, True])
def test_interrupted_packing_leaves_nothing(model, tmp_path, use_mmap):
    def interrupt(task: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(model, tmp_path / "cache", progress=interrupt, use_mmap=use_mmap)
    assert files(tmp_path / "cache") == []


def test_progress_counts_to_the_end(model):
    calls: list[tuple[str, int, int]] = []
    load(model, None, progress=lambda task, done, total: calls.append((task, done, total)))
    assert {task for task, _, _ in calls} == {"packing to q8"}
    done = [n for _, n, _ in calls]
    assert done[0] == 0
    assert done == sorted(done)
    assert calls[-1][1] == calls[-1][2]


def test_two_processes_may_pack_at_once(model, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from hybrid.checkpoint.hf import open_checkpoint\n"
        "from hybrid.kernels import Format\n"
        "from hybrid.weights import packed_file\n"
        "from hybrid.weights.layout import packed_layout\n"
        "packed_file.KEEP_FROM_BYTES = 0\n"
        "for _ in range(5):\n"
        "    with open_checkpoint(Path(sys.argv[1])) as checkpoint:\n"
        "        layout = packed_layout(checkpoint.config, Format.q8)\n"
        "        loaded = packed_file.load_packed(checkpoint, layout, cache=Path(sys.argv[2]))\n"
        "    for path in Path(sys.argv[2]).glob('*.safetensors'): path.unlink(missing_ok=True)\n"
        "    assert not loaded.notices\n"
    )
    arguments = [sys.executable, "-c", code, str(model), str(tmp_path / "cache")]
    processes = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert not [name for name in files(tmp_path / "cache") if name.endswith(".tmp")]


@pytest.mark.parametrize("use_mmap", [False, True])
def test_weights_are_locked_if_mlock_is_set(model, tmp_path, use_mmap):
    def locked_kb() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmLck:\s*(\d+) kB", status)[1])

    before = locked_kb()
    kept = load(model, tmp_path, use_mmap=use_mmap)
    assert not kept.is_locked
    assert locked_kb() == before
    locked = load(model, tmp_path, use_mmap=use_mmap, use_mlock=True)
    if not locked.is_locked:
        pytest.skip(f"not here: {locked.notices}")
    assert (locked_kb() - before) * 1024 >= locked.n_bytes
    del locked
    assert locked_kb() == before


def test_weights_that_do_not_fit_are_not_locked(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid.weights.memory._native.lock_bytes", None)
    loaded = load(model, tmp_path, use_mmap=True, use_mlock=True, fits_memory=False)
    assert not loaded.is_locked
    assert any("do not fit" in notice for notice in loaded.notices)


def test_a_refused_lock_is_reported(model, tmp_path, monkeypatch):
    def refuse(memory):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("hybrid.weights.memory._native.lock_bytes", refuse)
    loaded = load(model, tmp_path, use_mlock=True)
    assert not loaded.is_locked
    assert any("ulimit -l" in notice for notice in loaded.notices)
