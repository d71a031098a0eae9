"""The process that opens damaged models, one after the other, and says how each ended.

It reads requests from its standard input and writes answers to its standard output, a line each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid.checkpoint import open_checkpoint
from hybrid.errors import HybridError
from hybrid.model.families import expected_tensors
from hybrid.text.chat import as_chat
from hybrid.text.generation_config import read_generation_defaults
from hybrid.text.tokenizer import Tokenizer

_MAX_DATA_BYTES = 4 << 30
_ROWS = (slice(0, 64),)  # of each tensor, which is never more than its file holds
_TEXTS = ("Once upon a time", "", " a\tб用户😀</s><|im_start|>\0\r\n", "a" * 200 + "!")
_CHAT: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|> 用户"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And?"},
]


class _Refusals:
    """Collects what an input was refused with. Every other exception goes on."""

    def __init__(self) -> None:
        self.errors: list[HybridError] = []

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        try:
            yield
        except HybridError as error:
            self.errors.append(error)


def use_model(path: Path, refusals: _Refusals, *, use_mmap: bool) -> None:
    """Open a model, read of each tensor, and use its tokenizer."""
    activation = "relu" if path.suffix == ".gguf" else None
    with open_checkpoint(path, use_mmap=use_mmap, activation=activation) as checkpoint:
        config = checkpoint.config
        for tensor in expected_tensors(config):
            with refusals.allowed():
                checkpoint.tensor(tensor.role, tensor.layer).fp32(_ROWS)
        with refusals.allowed():
            assert len(checkpoint.weights_hash) > 8
    if path.suffix == ".gguf":
        use_tokenizer(path, refusals, config.vocab_size, config.bos_id)


def use_tokenizer(path: Path, refusals: _Refusals, n_ids: int, bos_id: int | None) -> None:
    with refusals.allowed():
        read_generation_defaults(path, n_ids)
    tokenizer = Tokenizer.from_folder(path, vocab_size=n_ids, bos_id=bos_id)
    for text in _TEXTS:
        with refusals.allowed():
            tokenizer.decode(tokenizer.encode(text))
        with refusals.allowed():
            tokenizer.encode_continuation(text)
    chat = as_chat(_CHAT)
    with refusals.allowed():
        tokenizer.encode_chat(chat)
        tokenizer.end_of_answer(chat)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one input. Return its problem, if there is one, and how it was refused."""
    refusals = _Refusals()
    path = Path(request["path"])
    forget_peak()
    before, began = memory("VmRSS"), time.process_time()
    found: dict[str, Any] = {}
    try:
        with refusals.allowed():
            if request["n_ids"]:
                use_tokenizer(path, refusals, request["n_ids"], 1)
            else:
                use_model(path, refusals, use_mmap=request["use_mmap"])
        problem = _unprintable(refusals.errors)
        if problem:
            found = {"problem": problem, "place": "message"}
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        found = {
            "problem": f"{type(error).__name__}: {error!r:.300}",
            "place": f"{Path(frame.filename).name}:{frame.lineno}",
            "traceback": traceback.format_exc()[-4000:],
        }
    return found | {
        "refused": type(refusals.errors[-1]).__name__ if refusals.errors else "",
        "growth": max(0, memory("VmHWM") - before),
        "seconds": time.process_time() - began,
    }


def _unprintable(errors: list[HybridError]) -> str:
    """Return a message that is not one line of text which any terminal can show."""
    for error in errors:
        message = str(error)
        if "\n" in message or len(message) > 4000:
            return f"a message of many lines or characters: {message[:300]!r}"
        try:
            message.encode()
        except UnicodeEncodeError:
            return f"a message that cannot be printed: {message[:300]!r}"
    return ""


def forget_peak() -> None:
    """Let the peak of memory begin at what is in use now (Linux: Documentation/filesystems)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Return VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where a hang is
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA_BYTES, _MAX_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
