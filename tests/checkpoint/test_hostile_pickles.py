"""Pickles that hold programs instead of tensors are refused by name and never run.

The files are made without torch.
"""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
