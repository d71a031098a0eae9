"""Fetch the vocabularies that llama.cpp tests itself with, from llama-cpp-python's source package.

    python tests/text/fetch_vocabularies.py [llama_cpp_python-0.3.36.tar.gz]

They are kept in `test-vocabularies` of HYBRID_HOME. A package that was downloaded before is used if
it is named, whatever its origin: its checksum is compared.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import tarfile
import urllib.request
from pathlib import Path

from hybrid.hub.catalog import hybrid_home

_URL = (
    "https://files.pythonhosted.org/packages/ec/e9/"
    "e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_WANTED = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[\w.-]+\.gguf(?:\.inp|\.out)?)")


def vocabularies_folder() -> Path:
    return hybrid_home() / "test-vocabularies"


def fetch(package: Path | None) -> int:
    """Unpack the vocabularies, and return how many files they are."""
    if package is not None:
        return unpack(package.read_bytes())
    with urllib.request.urlopen(_URL, timeout=60) as response:
        return unpack(response.read())


def unpack(content: bytes) -> int:
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        raise SystemExit(f"the package's SHA-256 is {found}, expected {_SHA256}")
    folder = vocabularies_folder()
    folder.mkdir(parents=True, exist_ok=True)
    n_files = 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            name = _WANTED.fullmatch(member.name)
            data = archive.extractfile(member) if name and member.isfile() else None
            if name and data:
                (folder / name[1]).write_bytes(data.read())
                n_files += 1
    return n_files


if __name__ == "__main__":
    n = fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(f"{n} files are in {vocabularies_folder()}")
