"""One `pytorch_model.bin`: reads the zip file that `torch.save` writes, without torch.

The zip holds `data.pkl`, a pickle that describes the tensors, and one uncompressed member per
storage. A pickle is a program, and Python's own unpickler runs whatever it names. Nothing can run
here. The few operations that `torch.save` writes are interpreted on plain values. A global is a
name that is looked up in a fixed list and never imported. The storages are mapped from the zip.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.tensor import Tensor, TensorEntry, map_file, map_tensor
from hybrid.errors import InvalidCheckpoint, one_line
from hybrid.files import open_file
from hybrid.kernels import _native

# These limits bound the time and memory of the interpreter below. A tensor needs 32 operations and
# 130 bytes, so 10,000 tensors fit. No such pickle takes a second.
_MAX_PICKLE_BYTES = 4 << 20
_MAX_OPERATIONS = 330_000
_MAX_DIRECTORY_BYTES = 4 << 20  # of the zip file; a member takes 80
_MAX_DIMENSIONS = 8
_READ_BYTES = 1 << 20
_IS_UTF8 = 1 << 11  # flag of a zip member: its name is UTF-8 and not code page 437

_STORAGES = {  # element type, bytes per element
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    # Never computed with, but harmless in a file, such as position ids and masks.
    "torch.DoubleStorage": ("F64", 8),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
_NUMBERS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
_LONE = ""  # the name of a tensor that is saved by itself
_ALLOWED_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    *_STORAGES,
}


# What torch.save writes. Every other operation of a pickle is refused by name.
_OPERATIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT", "BININT"),
    *("BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE1"),
    *("TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM"),
    *("SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL"),
    *("STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"),
}


_BY_CODE = {operation.code.encode("latin-1"): operation for operation in pickletools.opcodes}
_READERS = {  # of each allowed operation: its name, and what reads its argument
    code: (operation.name, None if operation.arg is None else operation.arg.reader)
    for code, operation in _BY_CODE.items()
    if operation.name in _OPERATIONS
}


class _Bounded:
    """A file of which `zipfile` can read only so much at once, such as its whole directory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file

    def read(self, n_bytes: int = -1) -> bytes:
        most = _MAX_DIRECTORY_BYTES + 1
        content = self._file.read(most if n_bytes < 0 else min(n_bytes, most))
        if len(content) == most:
            raise ValueError(f"its directory has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        return content


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements may be at the same place: a stride does not reach over smaller ones.

    Transposed, sliced and contiguous tensors do not overlap, expanded ones do.
    """
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


_GLOBALS = {name: _Global(name) for name in _ALLOWED_GLOBALS}


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    itemsize: int
    n_elements: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the pickle describes it. The offset and the strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchBin:
    """An open file. Raises `InvalidCheckpoint` if the zip or its pickle is broken.

    Storages are checked when a tensor is read, their checksums included.
    """

    def __init__(self, path: Path, *, use_mmap: bool = True) -> None:
        self._path, self._use_mmap = path, use_mmap
        self.paths: tuple[Path, ...] = (path,)
        self._buffer = map_file(path)
        self._members = self._find_members()
        # torch can leave all of them out (torch.serialization.set_crc32_options).
        self._has_checksums = any(member.CRC for member in self._members.values())
        self.notices: tuple[str, ...] = ()
        if not self._has_checksums:
            self.notices = (
                f"{path.name} holds no checksums: damaged weights would not be noticed",
            )
        self._verified: set[str] = set()
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InvalidCheckpoint(
                f"{path}: expected one data.pkl in the zip file, found {len(pickles)}"
            )
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._check_byte_order()
        begin, n_bytes = self._locate(pickles[0])
        if n_bytes > _MAX_PICKLE_BYTES:
            raise InvalidCheckpoint(
                f"{path}: its data.pkl has {n_bytes:,} bytes; a description of tensors needs less "
                f"than {_MAX_PICKLE_BYTES:,}"
            )
        self._verify(pickles[0], begin)
        self._entries = _read_pickle(self._buffer[begin : begin + n_bytes], path)

    @property
    def names(self) -> Collection[str]:
        return [
            name
            for name, entry in self._entries.items()
            if isinstance(name, str) and isinstance(entry, _Entry)
        ]

    def tensor(self, name: str) -> Tensor:
        described = self.entry(name)
        tensor = map_tensor(self._path, self._buffer, described, use_mmap=self._use_mmap)
        return replace(tensor, verify=self._verifier(name))

    def numbers(self) -> NDArray[np.float64]:
        """Return the values of the only tensor of a file, integers included, as a new array.

        Raises InvalidCheckpoint if the file holds anything else than one tensor of numbers.
        """
        if list(self._entries) != [_LONE]:
            raise InvalidCheckpoint(f"{self._path}: expected one tensor and nothing else")
        described = self.entry(_LONE)
        dtype = _NUMBERS.get(described.dtype)
        if dtype is None:
            raise InvalidCheckpoint(f"{self._path}: expected numbers, found {described.dtype}")
        if 0 in described.shape:
            raise InvalidCheckpoint(f"{self._path}: its tensor is empty")
        self._verifier(_LONE)()
        strides = [stride * dtype.itemsize for stride in described.strides or ()]
        values = np.ndarray(described.shape, dtype, self._buffer, described.begin, strides)
        return values.astype(np.float64)

    def _verifier(self, name: str) -> Callable[[], None]:
        """Return what verifies a tensor's bytes. It no longer reads the mapped file's directory."""
        member = f"{self._prefix}data/{self._entries[name].storage.key}"
        return partial(self._verify, member, self._locate(member)[0])

    def entry(self, name: str) -> TensorEntry:
        """Return what the file says of a tensor, whatever its type. Raises InvalidCheckpoint."""
        entry = self._entries.get(name)
        if not isinstance(entry, _Entry):
            raise InvalidCheckpoint(f"{self._path}: has no tensor {name!r}")
        storage = entry.storage
        member = f"{self._prefix}data/{storage.key}"
        begin, n_bytes = self._locate(member)
        if _overlaps(entry.shape, entry.strides):
            raise InvalidCheckpoint(
                f"{self._path}: tensor {name!r} has strides {entry.strides} for shape "
                f"{entry.shape}, so that elements share their bytes; save a contiguous copy of it"
            )
        last = entry.offset + sum(
            (size - 1) * stride for size, stride in zip(entry.shape, entry.strides, strict=True)
        )
        needed = last + 1
        if not needed <= storage.n_elements <= n_bytes // storage.itemsize:
            raise InvalidCheckpoint(
                f"{self._path}: tensor {name!r} needs {needed:,} elements of {storage.dtype}, but "
                f"its storage claims {storage.n_elements:,} and holds {n_bytes:,} bytes"
            )
        first = begin + entry.offset * storage.itemsize
        return TensorEntry(name, storage.dtype, entry.shape, first, entry.strides)

    def _verify(self, member_name: str, begin: int) -> None:
        """Compare a member's bytes with their checksum, once. Raises InvalidCheckpoint."""
        member = self._members[member_name]
        if member_name in self._verified or not self._has_checksums:
            return
        if self._use_mmap:
            crc = _native.crc32(np.frombuffer(self._buffer, np.uint8, member.file_size, begin))
        else:
            crc = self._read_checksum(begin, member.file_size)
        if crc != member.CRC:
            raise InvalidCheckpoint(
                f"{self._path}: member {member_name!r} is damaged: its checksum differs; download "
                "the file again"
            )
        self._verified.add(member_name)

    def _read_checksum(self, begin: int, n_bytes: int) -> int:
        """Read the bytes from the file, for which shrinking is no danger, unlike a mapping."""
        crc = 0
        try:
            with open_file(self._path) as file:
                file.seek(begin)
                while n_bytes > 0 and (part := file.read(min(n_bytes, _READ_BYTES))):
                    crc = _native.crc32(np.frombuffer(part, np.uint8), crc)
                    n_bytes -= len(part)
        except OSError as error:
            raise InvalidCheckpoint(f"{self._path}: {error.strerror or error}") from error
        if n_bytes > 0:
            raise InvalidCheckpoint(
                f"{self._path}: became shorter while it was read; download it again"
            )
        return crc

    def _find_members(self) -> dict[str, zipfile.ZipInfo]:
        path = self._path
        if self._buffer[:1] == b"\x80":  # a pickle without a zip
            raise InvalidCheckpoint(
                f"{path}: is in torch's format from before version 1.6; load it with torch and "
                "save it again, or convert it to safetensors"
            )
        try:
            with (
                open_file(path) as file,
                zipfile.ZipFile(cast(IO[bytes], _Bounded(file))) as archive,
            ):
                members = archive.infolist()
        except Exception as error:  # a broken zip raises half a dozen types of errors
            raise InvalidCheckpoint(
                f"{path}: is not the whole zip file of torch.save ({one_line(error)}); download it "
                "again"
            ) from error
        by_name = {member.filename: member for member in members}
        if len(by_name) < len(members):
            raise InvalidCheckpoint(f"{path}: has two members of the same name in the zip file")
        return by_name

    def _locate(self, member_name: str) -> tuple[int, int]:
        """Return where a member's bytes are in the file: (begin, n_bytes)."""
        member = self._members.get(member_name)
        if member is None:
            raise InvalidCheckpoint(f"{self._path}: has no member {member_name!r} in the zip file")
        is_encrypted = member.flag_bits & 1
        if member.compress_type != zipfile.ZIP_STORED or is_encrypted:
            raise InvalidCheckpoint(
                f"{self._path}: member {member_name!r} is compressed or encrypted; torch.save "
                "stores plain bytes: save the model again with torch"
            )
        header = member.header_offset
        local = self._buffer[header : header + 30] if header >= 0 else b""
        # The data begins after the name and padding of the local header, not of the directory.
        n_name, n_padding = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        begin = header + 30 + n_name + n_padding
        is_sound = local[:4] == b"PK\x03\x04" and member.compress_size == member.file_size
        if not is_sound or begin + member.file_size > len(self._buffer):
            raise InvalidCheckpoint(
                f"{self._path}: member {member_name!r} is not inside the file of "
                f"{len(self._buffer):,} bytes, which is broken or cut off: download it again"
            )
        name = member.orig_filename.encode("utf-8" if member.flag_bits & _IS_UTF8 else "cp437")
        if self._buffer[header + 30 : header + 30 + n_name] != name:
            raise InvalidCheckpoint(
                f"{self._path}: member {member_name!r} has another name in front of its data; "
                "download the file again"
            )
        return begin, member.file_size

    def _check_byte_order(self) -> None:
        name = f"{self._prefix}byteorder"
        if name not in self._members:  # before torch 2.1
            return
        begin, n_bytes = self._locate(name)
        self._verify(name, begin)
        if self._buffer[begin : begin + n_bytes] != b"little":
            raise InvalidCheckpoint(
                f"{self._path}: was saved on a big-endian machine; expected byte order little"
            )


def _read_pickle(pickle: bytes, path: Path) -> dict[str, Any]:
    try:
        state = _interpret(pickle, path)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{path}: its data.pkl is broken ({one_line(error)})") from error
    if isinstance(state, _Entry):
        return {_LONE: state}
    if not isinstance(state, dict):
        raise InvalidCheckpoint(f"{path}: holds no dictionary of tensors")
    return state


def _interpret(pickle: bytes, path: Path) -> object:
    """Interpret the pickle on plain values.

    Values are built and kept, but never called, hashed or compared, because deep nesting would
    overflow the C stack. Only strings and integers become keys.
    """
    stack: list[Any] = []
    marks: list[int] = []  # stack heights
    memo: dict[int, Any] = {}
    argument: Any

    def pop_to_mark() -> list[Any]:
        height = marks.pop()
        values = stack[height:]
        del stack[height:]
        return values

    for operation, argument in _operations(pickle, path):
        match operation:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                marks.append(len(stack))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(operation[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                _expect(stack[-1], list).append(value)
            case "APPENDS":
                values = pop_to_mark()
                _expect(stack[-1], list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                values = pop_to_mark()
                _set_items(stack[-1], values)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, name = argument.split(" ", 1)
                stack.append(_look_up(module, name, path))
            case "STACK_GLOBAL":
                name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(_look_up(module, name, path))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, arguments))
            case "BUILD":  # attributes of the OrderedDict: versions of the modules
                stack.pop()
                _expect(stack[-1], dict)
    return stack.pop()


def _operations(pickle: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each operation's name and argument. An operation that is refused is not even parsed.

    Raises InvalidCheckpoint, and ValueError if the pickle is cut off.
    """
    file = io.BytesIO(pickle)
    read = file.read
    for _ in range(_MAX_OPERATIONS):
        code = read(1)
        if code not in _READERS:
            operation = _BY_CODE.get(code)
            if operation is None:
                raise ValueError(f"at byte {file.tell()} there is no operation")
            raise InvalidCheckpoint(
                f"{path}: its data.pkl holds the pickle operation {operation.name}, which a file "
                "of tensors never needs; it was not run. Get the model from a source you trust"
            )
        name, reader = _READERS[code]
        yield name, None if reader is None else reader(file)
    raise InvalidCheckpoint(
        f"{path}: its data.pkl has more than {_MAX_OPERATIONS:,} operations, which would describe "
        "10,000 tensors; split the file"
    )


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value


def _set_items(target: Any, keys_and_values: list[Any]) -> None:
    keys = keys_and_values[::2]
    # Python hashes integers modulo 2^61 - 1, so large ones could be made to collide.
    if any(type(key) is not str and (type(key) is not int or abs(key) >= 2**32) for key in keys):
        raise TypeError("a key is neither a string nor a small integer")
    _expect(target, dict).update(zip(keys, keys_and_values[1::2], strict=True))


def _look_up(module: str, name: str, path: Path) -> _Global:
    full_name = f"{module}.{name}"
    found = _GLOBALS.get(full_name)
    if found is None:
        raise InvalidCheckpoint(
            f"{path}: its data.pkl asks for {full_name[:100]!r}, which a file of tensors never "
            "needs; it was not run. Get the model from a source you trust, or as safetensors"
        )
    return found


def _storage(persistent_id: object) -> _Storage:
    match persistent_id:
        case ("storage", _Global(name=kind), str(key), _, int(n_elements)) if kind in _STORAGES:
            return _Storage(key, *_STORAGES[kind], n_elements)
    raise ValueError("a reference does not lead to a storage")


def _reduce(function: object, arguments: object) -> dict[Any, Any] | _Entry:
    match (function, arguments):
        case (_Global(name="collections.OrderedDict"), ()):
            return {}
        case (_Global(name="torch._utils._rebuild_parameter"), (_Entry() as entry, _, _)):
            return entry
        case (
            _Global(name="torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _),
        ) if len(shape) == len(strides) <= _MAX_DIMENSIONS:
            if all(type(count) is int and count >= 0 for count in (offset, *shape, *strides)):
                return _Entry(storage, offset, shape, strides)
    raise ValueError("a call has arguments that torch.save does not write")
