"""Text files: UTF-8, read byte for byte.

Line ends stay as they are, because CR LF and LF are different tokens to a model. A byte-order mark
at the start is an encoding's signature and not part of the text; no model has learnt it, so it
would spoil every measurement. A notice says what was found.
"""

from __future__ import annotations

import codecs

BOM = codecs.BOM_UTF8


def decode_text(data: bytes) -> str:
    """Return the text of a whole file, without a byte-order mark. Raises UnicodeDecodeError.

    The error's `start` counts from the first byte of the file.
    """
    return data.decode("utf-8").removeprefix("\ufeff")


def text_notices(name: str, *, has_bom: bool, has_crlf: bool) -> tuple[str, ...]:
    """Return what a user should know about the text file `name`, one line each."""
    notices = []
    if has_bom:
        notices.append(f"{name}: begins with a byte-order mark, which is left out")
    if has_crlf:
        notices.append(f"{name}: has lines that end in CR LF, which stay: the model reads both")
    return tuple(notices)
