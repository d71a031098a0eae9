"""Files that torch saved are read exactly; broken and unsupported ones are refused."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.checkpoint import torch_bin
from hybrid.checkpoint.torch_bin import TorchBin
from hybrid.errors import InvalidCheckpoint, UnsupportedModel

torch = pytest.importorskip("torch", reason="torch writes the files that are read")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def rewrite(
    path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Replace the zip members whose names end in a key of `changes`; None removes a member."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for ending, content in changes.items():
        [name] = [name for name in members if name.endswith(f"/{ending}")] or [f"model/{ending}"]
        if content is None:
            del members[name]
        else:
            members[name] = content
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(name, member)


def test_what_torch_saves_is_read_exactly(path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    tensors = {
        "single": torch.randn(3, 5),
        "half": torch.randn(4, 2).half(),
        "brain": torch.randn(2, 7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "transposed": whole.T,
        "middle": whole[2:4, 1:7:2],
        "tied": whole,
    }
    for protocol in (2, 4, 5):
        torch.save({**tensors, "step": 3, "lr": 0.1}, path, pickle_protocol=protocol)
        file = TorchBin(path)
        for name, expected in tensors.items():
            tensor = file.tensor(name)
            assert (tensor.name, tensor.shape) == (name, tuple(expected.shape))
            assert not tensor.data.flags.writeable
            np.testing.assert_array_equal(
                tensor.fp32(), expected.detach().float().numpy(), strict=True
            )
        assert [file.tensor(name).dtype for name in tensors][:3] == ["F32", "F16", "BF16"]


def test_a_tensor_without_a_name_is_ignored(path: Path) -> None:
    torch.save({1: torch.ones(2), "named": torch.ones(2)}, path)
    assert TorchBin(path).names == ["named"]


def test_a_modules_state_dict_is_read(path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), path)
    file = TorchBin(path)
    np.testing.assert_array_equal(file.tensor("0.weight").fp32(), module[0].weight.detach())
    with pytest.raises(UnsupportedModel, match=r"'1\.num_batches_tracked' is I64; expected F32"):
        file.tensor("1.num_batches_tracked")
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model\.bin: has no tensor '2\.weight'"):
        file.tensor("2.weight")


class Described:
    """An object that pickles like a tensor of any shape, strides, offset and storage."""

    def __init__(
        self, shape: Any, strides: Any, offset: Any = 0, n_elements: Any = 6, key: str = "0"
    ) -> None:
        self.storage = (n_elements, key)
        self.rest = (offset, shape, strides)


class DescribingPickler(pickle._Pickler):
    """Writes `Described` objects as torch writes tensors."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, tuple) and value and value[0] == "a storage":
            n_elements, key = value[1]
            return ("storage", torch.FloatStorage, key, "cpu", n_elements)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Described):
            storage = ("a storage", value.storage)
            return torch._utils._rebuild_tensor_v2, (storage, *value.rest, False, {})
        return NotImplemented


@pytest.fixture
def write_described(path: Path) -> Callable[[Described], None]:
    """write(described): a file of tensor "a" over a float32 storage "0" of the values 0 to 5."""

    def write(described: Described) -> None:
        torch.save({"a": torch.arange(6.0)}, path)
        program = path.parent / "data.pkl"
        with program.open("wb") as file:
            DescribingPickler(file, protocol=2).dump({"a": described})
        rewrite(path, {"data.pkl": program.read_bytes()})

    return write


def test_tensors_that_fit_their_storage_are_read(
    path: Path, write_described: Callable[[Described], None]
) -> None:
    for described, expected in [
        (Described((2, 3), (3, 1)), [[0, 1, 2], [3, 4, 5]]),
        (Described((3, 2), (1, 3)), [[0, 3], [1, 4], [2, 5]]),
        (Described((2,), (3,), offset=2), [2, 5]),
        (Described((), (), offset=5), 5),
        (Described((1, 3), (0, 2)), [[0, 2, 4]]),  # the stride of one element means nothing
    ]:
        write_described(described)
        assert TorchBin(path).tensor("a").fp32().tolist() == expected


@pytest.mark.parametrize(
    ("described", "message"),
    [
        pytest.param(Described((7,), (1,)), "needs 7 elements", id="too long"),
        pytest.param(Described((6,), (1,), offset=1), "needs 7 elements", id="offset"),
        pytest.param(Described((2, 3), (4, 1)), "needs 7 elements", id="stride"),
        pytest.param(Described((3, 2**62), (0, 0)), "share", id="stride 0 makes it huge"),
        pytest.param(Described((2, 3), (0, 1)), "share their bytes", id="expanded"),
        pytest.param(Described((2, 3), (2, 1)), "share their bytes", id="rows overlap"),
        pytest.param(Described((2,), (2**63,)), "needs", id="overflow"),
        pytest.param(Described((6,), (1,), n_elements=5), "claims 5", id="storage's claim"),
        pytest.param(Described((7,), (1,), n_elements=7), "holds 24 bytes", id="storage's bytes"),
        pytest.param(Described((6,), (1,), key="1"), "no member", id="no such storage"),
        pytest.param(Described((6,), (1,), key="../data.pkl"), "no member", id="key is a path"),
        pytest.param(Described((0, 3), (3, 1)), "has shape", id="empty"),
        pytest.param(Described((1,) * 6, (1,) * 6), "has shape", id="six dimensions"),
        pytest.param(Described((1,) * 9, (1,) * 9), "arguments", id="nine dimensions"),
        pytest.param(Described((-1,), (1,)), "arguments", id="negative size"),
        pytest.param(Described((2,), (-1,), offset=1), "arguments", id="negative stride"),
        pytest.param(Described((2,), (1,), offset=-1), "arguments", id="negative offset"),
        pytest.param(Described((2,), (1, 1)), "arguments", id="strides too many"),
        pytest.param(Described((2.0,), (1,)), "arguments", id="fractional size"),
        pytest.param(Described((True,), (1,)), "arguments", id="size is a truth value"),
        pytest.param(Described((6,), (1,), n_elements="6"), "reference", id="count is text"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(
    path: Path, write_described: Callable[[Described], None], described: Described, message: str
) -> None:
    write_described(described)
    with pytest.raises(InvalidCheckpoint, match=message) as raised:
        TorchBin(path).tensor("a")
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": None}, "expected one data.pkl in the zip file, found 0"),
        ({"data/0": None}, "has no member 'pytorch_model/data/0'"),
        ({"data/0": b"123"}, "holds 3 bytes"),
        ({"other/data.pkl": b"}."}, "expected one data.pkl in the zip file, found 2"),
    ],
)
def test_zip_files_of_wrong_content_are_refused(
    path: Path, changes: dict[str, bytes | None], message: str
) -> None:
    torch.save({"a": torch.ones(2)}, path)
    rewrite(path, changes)
    with pytest.raises(InvalidCheckpoint, match=message):
        TorchBin(path).tensor("a")


def test_a_missing_byteorder_means_little_endian(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    rewrite(path, {"byteorder": None})
    assert TorchBin(path).tensor("a").fp32().tolist() == [1, 1]


def test_compressed_members_are_refused(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    rewrite(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidCheckpoint, match="is compressed or encrypted"):
        TorchBin(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_occurs_twice_is_refused(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pytorch_model/data/0", bytes(8))
    with pytest.raises(InvalidCheckpoint, match="two members of the same name"):
        TorchBin(path)


@pytest.mark.parametrize(
    ("position", "damage"),
    [
        pytest.param(0, b"PK\x05\x06", id="signature"),
        pytest.param(28, b"\xff\xff", id="padding that ends beyond the file"),
    ],
)
def test_a_broken_local_header_is_refused(path: Path, position: int, damage: bytes) -> None:
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("pytorch_model/data/0").header_offset + position
    content = bytearray(path.read_bytes())
    content[begin : begin + len(damage)] = damage
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match="is not inside the file"):
        TorchBin(path).tensor("a")


def place_of(path: Path, ending: str) -> tuple[int, int]:
    """Return where the local header of a zip member begins, and its data."""
    with zipfile.ZipFile(path) as archive:
        [member] = [m for m in archive.infolist() if m.filename.endswith(ending)]
    header = path.read_bytes()[member.header_offset :][:30]
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.header_offset, member.header_offset + 30 + sum(lengths)


@pytest.mark.parametrize("use_mmap", [False, True])
@pytest.mark.parametrize("ending", ["data/0", "data/1", "data.pkl", "byteorder"])
def test_a_flipped_bit_or_zeros_are_found_when_the_member_is_read(
    path: Path, ending: str, use_mmap: bool
) -> None:
    torch.save({"a": torch.ones(5), "b": torch.arange(9.0).reshape(3, 3)}, path)
    sound = path.read_bytes()
    _, begin = place_of(path, ending)
    for damage in (bytes([sound[begin] ^ 1]), b"\0" * 4):
        path.write_bytes(sound[:begin] + damage + sound[begin + len(damage) :])
        if damage == sound[begin : begin + len(damage)]:
            continue
        with pytest.raises(InvalidCheckpoint, match=f"{ending}.*checksum differs"):
            read_all(TorchBin(path, use_mmap=use_mmap))
    path.write_bytes(sound)
    read_all(TorchBin(path, use_mmap=use_mmap))


def read_all(file: TorchBin) -> None:
    for name in ("a", "b"):
        file.tensor(name).fp32()


def test_checksums_are_computed_once_for_a_storage(path: Path, monkeypatch: Any) -> None:
    whole = torch.randn(6, 8)
    torch.save({"a": whole, "b": whole[2:]}, path)
    file, calls = TorchBin(path), []
    crc32 = torch_bin._native.crc32
    monkeypatch.setattr(
        torch_bin._native,
        "crc32",
        lambda data, crc=0: (calls.append(data.size), crc32(data, crc))[1],
    )
    for _ in range(2):
        read_all(file)
    assert calls == [whole.nbytes]


def test_a_file_without_checksums_is_read_and_told(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(5)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    file = TorchBin(path)
    assert file.tensor("a").fp32().tolist() == [1.0] * 5
    assert "pytorch_model.bin holds no checksums" in file.notices[0]
    torch.save({"a": torch.ones(5)}, path)
    assert TorchBin(path).notices == ()


def test_a_member_of_another_name_in_front_of_its_data_is_refused(path: Path) -> None:
    torch.save({"a": torch.ones(5), "b": torch.zeros(5)}, path)
    header, _ = place_of(path, "data/1")
    content = bytearray(path.read_bytes())
    content[header + 30 + len("pytorch_model/data/")] = ord("0")
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"data/1' has another name in front of its data"):
        TorchBin(path).tensor("b")


def test_a_directory_of_millions_of_members_is_not_read(path: Path, monkeypatch: Any) -> None:
    torch.save({f"t{i}": torch.ones(1) for i in range(60)}, path)
    TorchBin(path)
    monkeypatch.setattr(torch_bin, "_MAX_DIRECTORY_BYTES", 4000)
    with pytest.raises(InvalidCheckpoint, match="its directory has more than 4,000 bytes"):
        TorchBin(path)


def test_the_format_before_torch_1_6_is_refused(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidCheckpoint, match=r"from before version 1\.6; load it with torch"):
        TorchBin(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"some text", "not the whole zip file"),
        (b"PK\x03\x04 and nothing else", "not the whole zip file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS pointer"),
        (b"<!doctype html>", "web page"),
    ],
)
def test_files_of_another_kind_are_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=message):
        TorchBin(path)
