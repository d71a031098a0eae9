"""Writes a folder in Hugging Face's layout: config.json, safetensors, and the files about text.

It is written under another name beside its own, and renamed when it is complete.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.gguf import is_gguf
from hybrid.checkpoint.json_file import read_object
from hybrid.exporting.encoding import Bytes
from hybrid.exporting.tensors import Written
from hybrid.exporting.writing import Meter
from hybrid.files import read_bytes, replacing, write_atomically
from hybrid.model.config import ModelConfig
from hybrid.text.gguf_vocabulary import read_gguf_tokenizer

MAX_FILE_BYTES = 50_000_000_000  # of one safetensors file, as in transformers 5
_MAX_TEXT_BYTES = 256 << 20
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Files about text, which are copied as they are. Code is a part of some models.
_GENERATION = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
_CLASSES = {"llama": "LlamaForCausalLM", "minicpm": "MiniCPMForCausalLM"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_folder(
    out: Path, files: Mapping[str, bytes], tensors: Sequence[Written], meter: Meter
) -> None:
    """Write a folder, or replace files of one. Raises OSError, and what reading raises."""
    work = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        work.mkdir()
        _write_weights(work, tensors, meter)
        for name, content in files.items():
            (work / name).parent.mkdir(exist_ok=True)
            write_atomically(work / name, content)
        _move(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move(work: Path, out: Path) -> None:
    if not out.exists():
        work.rename(out)
        return
    new = {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
    for name in sorted(new):
        (out / name).parent.mkdir(exist_ok=True)
        (work / name).replace(out / name)
    for old in out.iterdir():  # an index of older files would still be read
        if _WEIGHTS.fullmatch(old.name) and Path(old.name) not in new:
            old.unlink()


def _write_weights(folder: Path, tensors: Sequence[Written], meter: Meter) -> None:
    files = _shards(tensors)
    if len(files) == 1:
        _write_safetensors(folder / "model.safetensors", files[0], meter)
        return
    weight_map: dict[str, str] = {}
    for at, part in enumerate(files, 1):
        name = f"model-{at:05}-of-{len(files):05}.safetensors"
        _write_safetensors(folder / name, part, meter)
        weight_map |= {tensor.name: name for tensor in part}
    total = sum(tensor.n_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", _json(index))


def _shards(tensors: Sequence[Written]) -> list[list[Written]]:
    files: list[list[Written]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if files[-1] and n_bytes + tensor.n_bytes > MAX_FILE_BYTES:
            files.append([])
            n_bytes = 0
        files[-1].append(tensor)
        n_bytes += tensor.n_bytes
    return files


def _write_safetensors(path: Path, tensors: Sequence[Written], meter: Meter) -> None:
    """Write a file (github.com/huggingface/safetensors): length of the header, header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.n_bytes
        header[tensor.name] = {
            "dtype": tensor.type.name,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in _parts(tensors):
            file.write(np.ascontiguousarray(part).data)
            meter.add(part.nbytes)


def _parts(tensors: Sequence[Written]) -> Iterator[Bytes]:
    for tensor in tensors:
        yield from tensor.parts()


def config_json(checkpoint: Checkpoint, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json for a model that `config` describes.

    A folder's own config is kept, unless the scales are folded into the weights.
    """
    own = checkpoint.folder / "config.json"
    known = {"torch_dtype": _DTYPES[dtype], "tie_word_embeddings": config.has_tied_head}
    if own.is_file() and config.family == checkpoint.config.family:
        values = read_object(own)
        values.pop("dtype", None)
        named = (values.get("architectures") or [""])[0]
        if not str(named).endswith("ForCausalLM"):  # it was saved without its head
            known["architectures"] = [_CLASSES[config.family]]
        return values | known
    return _fields(config) | known


def _fields(config: ModelConfig) -> dict[str, Any]:
    """Return config.json as the family's class in transformers, or its own code, reads it."""
    ids = config.eos_ids
    fields: dict[str, Any] = {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.n_neurons,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": config.activation,
        "bos_token_id": config.bos_id,
        "eos_token_id": ids[0] if len(ids) == 1 else list(ids) or None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if config.activation == "fatrelu":
        fields["hidden_act_param"] = config.threshold
    if config.family == "minicpm":
        fields["scale_emb"] = config.embedding_scale
        fields["scale_depth"] = config.residual_scale * math.sqrt(config.n_layers)
        fields["dim_model_base"] = config.logit_scale * config.hidden_size
    return fields


def text_files(
    model: Path, config: ModelConfig, *, has_tokenizer: bool, is_folded: bool
) -> dict[str, bytes]:
    """Return the files about text by name: the folder's own, or those that a GGUF file stands for.

    Raises InvalidCheckpoint and UnsupportedModel for a GGUF file's tokenizer.
    """
    if not is_gguf(model):
        patterns = [*_GENERATION, *(_TOKENIZER if has_tokenizer else ())]
        patterns += () if is_folded else _CODE  # a Llama needs no code
        paths = sorted(path for pattern in patterns for path in model.glob(pattern))
        return {
            path.relative_to(model).as_posix(): read_bytes(path, _MAX_TEXT_BYTES) for path in paths
        }
    ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None}
    files = {
        "generation_config.json": _json({k: v for k, v in ids.items() if v is not None}),
    }
    if has_tokenizer:
        layout, settings = read_gguf_tokenizer(model)
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        templates = settings.get("chat_template")
        if templates and [entry["name"] for entry in templates] == ["default"]:
            settings["chat_template"] = templates[0]["template"]
        files["tokenizer.json"] = _json(layout)
        files["tokenizer_config.json"] = _json(settings)
    return files


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def folder_files(
    checkpoint: Checkpoint, config: ModelConfig, dtype: str, *, has_tokenizer: bool
) -> dict[str, bytes]:
    """Return all files but the weights."""
    is_folded = config.family != checkpoint.config.family
    files = text_files(checkpoint.folder, config, has_tokenizer=has_tokenizer, is_folded=is_folded)
    return files | {"config.json": _json(config_json(checkpoint, config, dtype))}
