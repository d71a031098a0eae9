"""Tensors of a checkpoint widen to float32 exactly and outlive their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hybrid.checkpoint.tensor import Tensor, TensorEntry, map_file, map_tensor
from hybrid.errors import InvalidCheckpoint


def test_every_bfloat16_widens_to_the_float32_of_the_same_bits() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    wide = Tensor("every", "BF16", bits).fp32()
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)
    assert Tensor("one", "BF16", np.array([0x3F80, 0xC000], np.uint16)).fp32().tolist() == [1, -2]


def test_every_float16_widens_to_its_value() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00].view(np.float16)
    np.testing.assert_array_equal(Tensor("every", "F16", finite).fp32(), finite.astype("f8"))


def test_float32_is_a_view() -> None:
    data = np.ones((2, 3), np.float32)
    assert np.shares_memory(Tensor("a", "F32", data).fp32(), data)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_strided_tensors_become_contiguous(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.arange(64, dtype=np.uint16).tobytes())
    buffer = map_file(path)
    tensor = map_tensor(path, buffer, TensorEntry("a", dtype, (3, 2), 8, (1, 4)))
    plain = map_tensor(path, buffer, TensorEntry("b", dtype, (2, 4), 8))
    wide = tensor.fp32()
    assert wide.flags.c_contiguous
    np.testing.assert_array_equal(wide, plain.fp32()[:, :3].T)


def test_a_scalar_stays_a_scalar(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.float32(3.5).tobytes())
    scalar = map_tensor(path, map_file(path), TensorEntry("a", "F32", (), 0))
    assert scalar.fp32().shape == ()


def test_an_array_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.ones(1000, np.float32).tobytes())
    data = map_tensor(path, map_file(path), TensorEntry("a", "F32", (1000,), 0)).fp32()
    path.unlink()
    assert data.sum() == 1000


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in ("gone", "dangling", "."):
        with pytest.raises(InvalidCheckpoint, match="is missing"):
            map_file(tmp_path / name)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_tensors_are_compared_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_mmap: bool
) -> None:
    rows, cols = 50, 8
    values = np.random.default_rng(0).integers(0, 9, (rows, cols)).astype("<f4")
    path = tmp_path / "file"
    half = (values.view("<u4") >> 16).astype("<u2")
    path.write_bytes(values.tobytes() * 2 + half.tobytes() + values.T.tobytes())
    begins = {"F32": 0, "F32 too": values.nbytes, "BF16": 2 * values.nbytes}
    buffer = map_file(path)

    def tensor(name: str, begin: int, strides: tuple[int, int] | None = None) -> Tensor:
        entry = TensorEntry(name, name.split()[0], (rows, cols), begin, strides)
        return map_tensor(path, buffer, entry, use_mmap=use_mmap)

    tensors = [tensor(*item) for item in begins.items()]
    tensors.append(tensor("F32 transposed", 2 * values.nbytes + half.nbytes, (1, rows)))
    monkeypatch.setattr("hybrid.checkpoint.tensor._COMPARED_BYTES", 7 * 4 * cols)
    read = []
    stored = Tensor._stored

    def counted(self: Tensor, part: tuple[slice, ...]) -> np.ndarray:
        values = stored(self, part)
        read.append(len(values))
        return values

    monkeypatch.setattr(Tensor, "_stored", counted)
    for one in tensors:
        for other in tensors:
            assert one.has_values_of(other)
    assert max(read) <= 14  # of 50 rows
    assert not tensors[0].has_values_of(
        map_tensor(path, buffer, TensorEntry("a", "F32", (rows,), 0))
    )
    changed = bytearray(path.read_bytes())
    changed[values.nbytes - 2] ^= 0x40  # in the last value of the first
    path.write_bytes(changed)
    fresh = map_file(path)
    first = map_tensor(path, fresh, TensorEntry("a", "F32", (rows, cols), 0), use_mmap=use_mmap)
    second = TensorEntry("b", "F32", (rows, cols), values.nbytes)
    assert not first.has_values_of(map_tensor(path, fresh, second, use_mmap=use_mmap))
