"""Safetensors files are read without a copy, and unsound ones are refused with the reason."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.checkpoint.safetensors import SafetensorsFile
from hybrid.errors import InvalidCheckpoint, UnsupportedModel


def entry(shape: object, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, n_data: int, n_header: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(encoded) if n_header is None else n_header)
    path.write_bytes(length + encoded + bytes(n_data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_torch_saves_is_read_exactly(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch writes the file that is read")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "single": torch.randn(3, 5),
        "half": torch.randn(4, 2).half(),
        "brain": torch.randn(2, 7).bfloat16(),
        "vector": torch.randn(3).bfloat16(),
    }
    save_file(tensors, path)
    file = SafetensorsFile(path)
    for name, expected in tensors.items():
        tensor = file.tensor(name)
        assert (tensor.name, tensor.shape) == (name, tuple(expected.shape))
        assert not tensor.data.flags.writeable
        actual = tensor.fp32()
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected.float().numpy(), strict=True)
    assert [file.tensor(name).dtype for name in tensors] == ["F32", "F16", "BF16", "BF16"]


def test_nothing_is_copied(path: Path) -> None:
    write(path, {"a": entry([64, 32], 0, 8192), "b": entry([8], 8192, 8208, "BF16")}, 8208)
    file = SafetensorsFile(path)
    base = file.tensor("a").data.base
    assert base is not None
    assert file.tensor("b").data.base is base  # both are views of the one mapping


def test_an_unaligned_tensor_is_read_correctly(path: Path) -> None:
    values = np.arange(1, 5, dtype="<f4")
    header = json.dumps({"a": entry([4], 0, 16)}).encode()
    header += b" " * (-(len(header) + 8) % 4 + 1)  # the data begin one byte past alignment
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    actual = SafetensorsFile(path).tensor("a").fp32()
    assert actual.flags.aligned
    np.testing.assert_array_equal(actual, values)


def test_a_missing_tensor_is_refused(path: Path) -> None:
    write(path, {"a": entry([2], 0, 8)}, 8)
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: has no tensor 'b'"):
        SafetensorsFile(path).tensor("b")


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
TWICE += b'"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}'


# The wording of the safetensors library, in version 0.4.3 or 0.8.
TOO_SMALL = "HeaderTooSmall|header too small"
LENGTH = "InvalidHeaderLength|invalid header length"
CONTENT = "InvalidHeader|invalid (JSON|UTF-8) in header"
COVERAGE = "MetadataIncompleteBuffer|file not fully covered"
OFFSET = "InvalidOffset|invalid offset for tensor"
SIZE = "TensorInvalidInfo|invalid shape, data type, or offset"
OVERFLOW = "ValidationOverflow|overflow computing"


@pytest.mark.parametrize(
    ("header", "n_data", "n_header", "message"),
    [
        pytest.param({}, 0, 2**25 + 1, "would have 33,554,433 bytes", id="header over 32 MB"),
        pytest.param({}, 0, 2**64 - 1, "would have 18,446,", id="header of 2**64"),
        pytest.param({}, 0, 3, LENGTH, id="header beyond the file"),
        pytest.param({"a": entry([2], 0, 8)}, 4, None, COVERAGE, id="data cut off"),
        pytest.param({"a": entry([2], 0, 8)}, 12, None, COVERAGE, id="data left over"),
        pytest.param(
            {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, None, OFFSET, id="overlap"
        ),
        pytest.param({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, None, OFFSET, id="hole"),
        pytest.param({"a": entry([2], 8, 0)}, 8, None, OFFSET, id="end before begin"),
        pytest.param({"a": entry([3], 0, 8)}, 8, None, SIZE, id="shape is not bytes"),
        pytest.param({"a": entry([2**40] * 2, 0, 8)}, 8, None, OVERFLOW, id="shape overflows"),
        pytest.param({"a": entry([-2], 0, 8)}, 8, None, CONTENT, id="negative size"),
        pytest.param({"a": entry([2.0], 0, 8)}, 8, None, CONTENT, id="fractional size"),
        pytest.param({"a": entry([2], 0, 8, "F33")}, 8, None, CONTENT, id="unheard-of type"),
        pytest.param(TWICE, 8, None, "its header has the field 'a' twice", id="name twice"),
        pytest.param([], 0, None, CONTENT, id="header is no object"),
        pytest.param(b"{x", 0, None, CONTENT, id="header is no JSON"),
        pytest.param(b"\xff\xfe{}", 0, None, CONTENT, id="header is no UTF-8"),
        pytest.param(b'{"a":' + b"[" * 5000, 0, None, CONTENT, id="header nests deep"),
    ],
)
def test_unsound_files_are_refused(
    path: Path, header: object, n_data: int, n_header: int | None, message: str
) -> None:
    write(path, header, n_data, n_header)
    with pytest.raises(InvalidCheckpoint, match=message) as raised:
        SafetensorsFile(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", TOO_SMALL),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS pointer"),
        (b"\n<!DOCTYPE html><html>not found</html>", "web page"),
        (b"<html><body>not found</body></html>", "web page"),
    ],
)
def test_files_of_another_kind_are_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("bad", "n_data", "error", "message"),
    [
        (entry([1], 0, 8, "I64"), 8, UnsupportedModel, "'a' is I64; expected F32, F16, BF16"),
        (entry([8], 0, 8, "F8_E4M3"), 8, UnsupportedModel, "'a' is F8_E4M3"),
        (entry([0, 2**62, 2**62], 0, 0), 0, InvalidCheckpoint, "'a' has shape"),
        (entry([1] * 100, 0, 4), 4, InvalidCheckpoint, "'a' has shape"),
        (["F32", [2], [0, 8]], 8, InvalidCheckpoint, "'a': expected an object"),
    ],
)
def test_a_tensor_that_is_unusable_spoils_only_itself(
    path: Path, bad: object, n_data: int, error: type[Exception], message: str
) -> None:
    write(path, {"a": bad, "b": entry([2], n_data, n_data + 8)}, n_data + 8)
    file = SafetensorsFile(path)
    assert file.tensor("b").shape == (2,)
    with pytest.raises(error, match=message):
        file.tensor("a")


def test_the_reason_is_one_short_line(path: Path) -> None:
    write(path, {"a": "long\n" * 3000}, 0)
    with pytest.raises(InvalidCheckpoint, match="not a sound safetensors file") as raised:
        SafetensorsFile(path)
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)


def test_a_header_of_200_mb_is_refused_unread(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 200 << 20) + b"{")
    with path.open("r+b") as file:
        file.truncate(8 + (200 << 20))
    tracemalloc.start()
    with pytest.raises(InvalidCheckpoint, match="would have 209,715,200 bytes"):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_tensors_are_read(path: Path) -> None:
    write(path, {f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(100_000)}, 400_000)
    assert SafetensorsFile(path).tensor("t99999").shape == (1,)
