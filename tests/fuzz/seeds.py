"""Sound files of every format that hybrid reads, small ones, which the fuzzer then damages."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file
from text.vocabularies import LAYOUTS, layout_of, n_ids
from tiny_models import CHATML, LLAMA, change_json, random_tensors, write_model

TARGETS = ("gguf", "safetensors", "bin", "tokenizer")

# A Llama of few kilobytes, and one whose rows fill blocks of 256 values.
_SMALL = LLAMA | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}
_WIDE = _SMALL | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
_WORDS = ("▁", *"abcdehlnortu.!", "▁a", "on", "ce", "▁t", "he", "▁the", "用", "户")


class Seed(NamedTuple):
    """The files of a model, and the one to open, or "" for the folder."""

    files: dict[str, bytes]
    opens: str
    n_ids: int = 0  # of a tokenizer without a model


@functools.cache
def seeds_of(target: str) -> tuple[Seed, ...]:
    makers: dict[str, Callable[[Path], list[Seed]]] = {
        "gguf": _gguf_seeds,
        "safetensors": _safetensors_seeds,
        "bin": _bin_seeds,
        "tokenizer": _tokenizer_seeds,
    }
    with tempfile.TemporaryDirectory() as folder:
        return tuple(makers[target](Path(folder)))


def _sentencepiece_keys() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(id) for id in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(_WORDS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


def _byte_level_keys(pre: str) -> dict[str, Any]:
    model = json.loads(layout_of("gpt-2"))["model"]
    markers = ["<|im_start|>", "<|im_end|>"]
    pieces = sorted(model["vocab"].keys() - markers, key=model["vocab"].__getitem__)[:290]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    known = set(pieces)
    merges = [merge for merge in merges if merge.replace(" ", "") in known]
    pieces += markers
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [*[1] * (len(pieces) - 2), 3, 3],
        "tokenizer.ggml.eos_token_id": len(pieces) - 1,
        "tokenizer.chat_template": CHATML,
    }


def _gguf_seeds(folder: Path) -> list[Seed]:
    small = write_model(folder / "small", **_SMALL)
    wide = write_model(folder / "wide", **_WIDE)
    mini = write_model(
        folder / "mini", hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=300
    )
    sentencepiece = _sentencepiece_keys()
    path = folder / "x.gguf"
    seeds = []
    for model, kind, vocabulary in (
        (small, "F32", sentencepiece),
        (small, "F16", _byte_level_keys("qwen2")),
        (small, "Q4_0", _byte_level_keys("smollm")),
        (small, "Q8_0", sentencepiece | {"tokenizer.chat_template": CHATML}),
        (mini, "F16", sentencepiece),
        (wide, "Q6_K", _byte_level_keys("llama-bpe")),
    ):
        content = write_gguf(path, model, kind, vocabulary=vocabulary).read_bytes()
        seeds.append(Seed({"x.gguf": content}, "x.gguf"))
    content = seeds[1].files["x.gguf"]
    seeds.append(Seed({"x.gguf": content[:4] + struct.pack("<I", 2) + content[8:]}, "x.gguf"))
    content = write_gguf(path, small, vocabulary=sentencepiece, predictor_ranks=(4,)).read_bytes()
    seeds.append(Seed({"x.gguf": content}, "x.gguf"))
    parts = {}
    for at in range(2):
        keys = None if at else sentencepiece
        content = write_gguf(path, small, vocabulary=keys, split=(at, 2)).read_bytes()
        parts[f"x-0000{at + 1}-of-00002.gguf"] = content
    return [*seeds, Seed(parts, "x-00001-of-00002.gguf")]


def _safetensors_seeds(folder: Path) -> list[Seed]:
    whole = write_model(folder / "whole", **_SMALL)
    change_json(whole / "config.json", torch_dtype="float32", rope_theta=10000.0)
    mini = write_model(folder / "mini", **_SMALL | {"hidden_act": "relu"})
    (mini / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.8}')
    shards = write_model(folder / "shards", **_SMALL)
    tensors = load_file(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    for shard in set(where.values()):
        part = {name: w for name, w in tensors.items() if where[name] == shard}
        save_file({name: w.astype("<f2") for name, w in part.items()}, shards / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    return [Seed(_files_of(model), "") for model in (whole, mini, shards)]


def _bin_seeds(folder: Path) -> list[Seed]:
    import torch

    model = write_model(folder / "model", **_SMALL)
    (model / "model.safetensors").unlink()
    seeds = []
    for dtype in (torch.float32, torch.bfloat16):
        arrays = random_tensors(_SMALL | {"rms_norm_eps": 1e-5})
        tensors: dict[str, Any] = {
            name: torch.from_numpy(w).to(dtype) for name, w in arrays.items()
        }
        tensors["model.norm.weight"] = torch.nn.Parameter(tensors["model.norm.weight"])
        for zipped in (True, False):
            content = io.BytesIO()
            torch.save(tensors, content, _use_new_zipfile_serialization=zipped)
            files = _files_of(model) | {"pytorch_model.bin": content.getvalue()}
            seeds.append(Seed(files, ""))
    return seeds


def _tokenizer_seeds(folder: Path) -> list[Seed]:
    seeds = []
    for name in LAYOUTS:
        layout = json.loads(layout_of(name))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": layout["added_tokens"][0]["content"],
            "eos_token": {"content": layout["added_tokens"][-1]["content"], "lstrip": False},
            "added_tokens_decoder": {str(t["id"]): t for t in layout["added_tokens"]},
            "chat_template": CHATML,
        }
        files = {"tokenizer.json": layout, "tokenizer_config.json": settings}
        encoded = {name: json.dumps(content).encode() for name, content in files.items()}
        seeds.append(Seed(encoded, "", n_ids(layout)))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    legacy = {
        "tokenizer.model": _sentencepiece_file(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(settings | {"unk_token": "<unk>"}).encode(),
        "added_tokens.json": json.dumps({"<|im_start|>": 280, "<|im_end|>": 281}).encode(),
        "chat_template.jinja": CHATML.encode(),
        "generation_config.json": b'{"eos_token_id": 2, "top_p": 0.9, "do_sample": true}',
    }
    return [*seeds, Seed(legacy, "", 300)]


def _sentencepiece_file() -> bytes:
    """Return a tokenizer.model: a protocol buffer, written by hand."""
    keys = _sentencepiece_keys()
    content = b""
    columns = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for text, score, kind in zip(*columns, strict=True):
        data = text.encode()
        piece = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", score)
        piece += b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x18\x02\x98\x02\x01"  # BPE, with bytes
    normalizer = b"\x18\x01\x20\x00"  # a space before a text; spaces stay
    for number, part in ((b"\x12", trainer), (b"\x1a", normalizer)):
        content += number + bytes([len(part)]) + part
    return content


def _files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
