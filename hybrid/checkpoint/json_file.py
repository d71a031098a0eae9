"""The JSON files of a model: config.json, an index of weights, the files of a tokenizer.

All of them are read here, so that the same mistakes are refused in each: a pipe or a huge file in
place of the file, broken UTF-8, deep nesting, a key that occurs twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.errors import InvalidCheckpoint
from hybrid.files import read_bytes
from predictors.schema import Malformed, parse_json

# The index of 100,000 tensors has 10 MB, a tokenizer of 250,000 pieces 20 MB.
MAX_JSON_BYTES = 64 << 20


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return a file's text, without the byte-order mark of an editor. Raises InvalidCheckpoint."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"{path}: is missing; download the whole model") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(
            f"{path}: is not UTF-8 text (byte {error.start}); download it again"
        ) from error


def parse_object(path: Path, text: str, *, keeps_constants: bool = False) -> dict[str, Any]:
    """Parse a file's text, a JSON object. `path` is for messages. Raises InvalidCheckpoint.

    NaN and Infinity, which Python writes and JSON lacks, are refused or, with `keeps_constants`,
    become floats.
    """
    try:
        content = parse_json(text, keeps_constants=keeps_constants)
    except Malformed as error:
        raise InvalidCheckpoint(f"{path}: {error}; mend it or download it again") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_object(
    path: Path, max_bytes: int = MAX_JSON_BYTES, *, keeps_constants: bool = False
) -> dict[str, Any]:
    """Read a file that holds a JSON object; see `parse_object`. Raises InvalidCheckpoint."""
    return parse_object(path, read_text(path, max_bytes), keeps_constants=keeps_constants)
