"""Pickles that hold programs instead of tensors are refused by name and never run.

The files are made without torch.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slow import slow_except

from hybrid.checkpoint import torch_bin
from hybrid.checkpoint.torch_bin import TorchBin
from hybrid.errors import InvalidCheckpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def write_pickle(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program)


class Call:
    """An object that pickles to a program which calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "rmdir '{}'", r"(posix|nt)\.system"),
        (builtins.eval, "__import__('os').rmdir('{}')", r"(__builtin__|builtins)\.eval"),
        (shutil.rmtree, "{}", r"shutil\.rmtree"),
        (collections.Counter, "{}", r"collections\.Counter"),
    ],
)
def test_programs_are_refused_by_name_and_not_run(
    path: Path, function: Callable[..., Any], argument: str, name: str, protocol: int
) -> None:
    victim = path.parent / "victim"
    victim.mkdir()
    call = Call(function, argument.format(victim))
    nested = collections.OrderedDict({"a": 1, "b": [{"c": (call, 1)}]})
    for state in (call, {"a": call}, nested):
        write_pickle(path, pickle.dumps(state, protocol))
        with pytest.raises(InvalidCheckpoint, match=f"asks for '{name}'.*was not run"):
            TorchBin(path)
        assert victim.is_dir()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(b"\x80\x02(S'id'\nios\nsystem\n.", "operation STRING", id="STRING"),
        pytest.param(b"\x80\x02(ios\nsystem\n.", "operation INST", id="INST"),
        pytest.param(b"\x80\x02(o.", "operation OBJ", id="OBJ"),
        pytest.param(b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ", id="NEWOBJ"),
        pytest.param(b"\x80\x02\x82\x01.", "operation EXT1", id="EXT1"),
        pytest.param(b"\x80\x02P1\n.", "operation PERSID", id="PERSID"),
        pytest.param(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2 x\n.", "asks for", id="spaces"),
        pytest.param(b"\x80\x02ctorch._utils\nos.system\n.", "asks for", id="dotted name"),
        pytest.param(
            b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "asks for", id="torch's own loader"
        ),
        pytest.param(b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "arguments", id="dict's pairs"),
        pytest.param(b"\x80\x02ctorch\nFloatStorage\n)R.", "arguments", id="storage is called"),
        pytest.param(b"\x80\x02)R.", "data.pkl is broken", id="REDUCE on an empty stack"),
        pytest.param(b"\x80\x02))R.", "arguments", id="REDUCE of a tuple"),
        pytest.param(b"\x80\x02K\x01}b.", "data.pkl is broken", id="BUILD of a number"),
        pytest.param(
            b"\x80\x02ctorch\nFloatStorage\n}b.", "data.pkl is broken", id="BUILD of a global"
        ),
        pytest.param(b"\x80\x02K\x01Q.", "reference", id="reference to a number"),
        pytest.param(b"\x80\x02h\x07.", "data.pkl is broken", id="memo never written"),
        pytest.param(b"\x80\x02u.", "data.pkl is broken", id="no mark"),
        pytest.param(b"\x80\x02}K\x01s.", "data.pkl is broken", id="item without a key"),
        pytest.param(b"\x80\x02})K\x01s.", "data.pkl is broken", id="tuple as a key"),
        pytest.param(
            b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "data.pkl is broken", id="deep key"
        ),
        pytest.param(b"\x80\x02)" + b"\x85" * 200_000 + b".", "no dictionary", id="deep nesting"),
        pytest.param(b"\x80\x02].", "no dictionary", id="a list"),
        pytest.param(b"\x80\x02}", "data.pkl is broken", id="no STOP"),
        pytest.param(b"", "data.pkl is broken", id="empty"),
        pytest.param(
            b"\x80\x02X\xff\xff\xff\x7fabc.", "data.pkl is broken", id="text beyond the file"
        ),
        pytest.param(b"\x80\x02" + b"N" * (4 << 20) + b".", "bytes; a description", id="too long"),
    ],
)
def test_broken_and_hostile_pickles_are_refused(path: Path, program: bytes, message: str) -> None:
    write_pickle(path, program)
    with pytest.raises(InvalidCheckpoint, match=message) as raised:
        TorchBin(path)
    assert str(raised.value).startswith(str(path))


def test_the_number_of_operations_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of four megabytes could hold four million of them."""
    monkeypatch.setattr(torch_bin, "_MAX_OPERATIONS", 1000)
    write_pickle(path, b"\x80\x02" + b"N" * 998 + b".")
    with pytest.raises(InvalidCheckpoint, match="holds no dictionary"):
        TorchBin(path)
    write_pickle(path, b"\x80\x02" + b"N" * 999 + b".")
    with pytest.raises(InvalidCheckpoint, match="more than 1,000 operations"):
        TorchBin(path)


# The worst pickles of nearly four megabytes that we could think of: as many operations as the bound
# lets through, or the slowest ones.
N = 329_000  # operations
PROTOCOL = b"\x80\x02"


def text(value: bytes) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value


STORAGE = (
    b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x01tQ"
)
# Memo 1: a shape of eight dimensions, 2: a storage, 3: the function that makes tensors.
TENSOR_PARTS = (
    b"(" + b"K\x01" * 8 + b"tq\x01" + STORAGE + b"q\x02ctorch._utils\n_rebuild_tensor_v2\nq\x03"
)
TENSOR = b"h\x03(h\x02K\x00h\x01h\x01\x89NtR"

WORST: dict[str, Callable[[], bytes]] = {
    "operations without end": lambda: b"N" * 4_000_000 + b".",
    "small operations": lambda: b"(" + b"N" * N + b"t.",
    "nested tuples": lambda: b")" + b"\x85" * N + b".",
    "tuples of three": lambda: b"NN" + b"N\x87NN" * (N // 4) + b".",
    "marks": lambda: b"(t" * (N // 2) + b".",
    "memo reads": lambda: b"}q\x00" + b"h\x00" * N + b".",
    "memo writes": lambda: (
        b"}" + b"".join(b"r%b" % i.to_bytes(4, "little") for i in range(N)) + b"."
    ),
    "updates": lambda: b"}" + b"}b" * (N // 2) + b".",
    "appends": lambda: b"]" + b"(Ne" * (N // 3) + b".",
    "items": lambda: b"}" + b"".join(text(b"%d" % i) + b"Ns" for i in range(N // 3)) + b".",
    "globals": lambda: b"ctorch\nFloatStorage\n" * 199_000 + b".",
    "calls": lambda: b"ccollections\nOrderedDict\nq\x01" + b"h\x01)R" * (N // 3) + b".",
    "long integers": lambda: (b"\x8a\xff" + b"\x7f" * 255) * 16_000 + b".",
    "long texts": lambda: text("é".encode() * 20_000) * 100 + b".",
    "storages": lambda: STORAGE * (4_100_000 // len(STORAGE)) + b".",
    "tensors": lambda: (
        TENSOR_PARTS + b"}(" + b"".join(text(b"%d" % i) + TENSOR for i in range(N // 10)) + b"u."
    ),
}


@pytest.mark.parametrize("shape", slow_except(WORST, "operations without end", "tensors"))
def test_no_small_pickle_takes_long(
    path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Each takes less than a second of one processor. Only much more than that is a failure."""
    program = PROTOCOL + WORST[shape]()
    assert 329_000 < len(program) < torch_bin._MAX_PICKLE_BYTES
    write_pickle(path, program)
    operations, done = torch_bin._operations, 0

    def counted(pickle: bytes, of: Path) -> Iterator[tuple[str, Any]]:
        nonlocal done
        for operation in operations(pickle, of):
            done += 1
            yield operation

    monkeypatch.setattr(torch_bin, "_operations", counted)
    started = time.process_time()
    with contextlib.suppress(InvalidCheckpoint):
        TorchBin(path)
    assert time.process_time() - started < 5
    assert 0 < done <= 330_000


def test_a_model_of_10_000_tensors_is_within_the_bounds() -> None:
    operations, n_bytes = 32, 130  # of a tensor, as torch.save writes it
    assert 10_000 * operations < torch_bin._MAX_OPERATIONS
    assert 10_000 * n_bytes < torch_bin._MAX_PICKLE_BYTES


def test_integers_that_collide_are_no_keys(path: Path) -> None:
    """All multiples of 2^61 - 1 have the hash 0, so that a dictionary of them takes hours."""
    keys = [(i * (2**61 - 1)).to_bytes(10, "little") for i in range(1, 50)]
    write_pickle(path, b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key + b"N" for key in keys) + b"u.")
    with pytest.raises(InvalidCheckpoint, match="neither a string nor a small integer"):
        TorchBin(path)


def test_the_argument_of_a_refused_operation_is_not_parsed(path: Path) -> None:
    """Some versions of Python take minutes for a decimal number of millions of digits."""
    write_pickle(path, b"\x80\x02I" + b"1" * 100_000 + b"\n.")
    with pytest.raises(InvalidCheckpoint, match="operation INT, which"):
        TorchBin(path)


def test_a_huge_memo_index_costs_nothing(path: Path) -> None:
    write_pickle(path, b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(InvalidCheckpoint, match="has no tensor 'a'"):
        TorchBin(path).tensor("a")
