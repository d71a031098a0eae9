"""A model as the metadata and the tensors of a GGUF file, llama.cpp's or PowerInfer's.

The inverse of `hybrid.checkpoint.gguf.architecture`, whose names and keys it uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.gguf import is_gguf
from hybrid.checkpoint.gguf.activation import KEY
from hybrid.checkpoint.gguf.architecture import DOWN, TRANSPOSED, gguf_name, stored_rows
from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.checkpoint.gguf.reader import GgufFile, read_gguf
from hybrid.checkpoint.name import model_name
from hybrid.exporting.encoding import BF16, F16, F32, Q4_0, Q8_0
from hybrid.exporting.gguf_tokenizer import tokenizer_keys
from hybrid.exporting.tensors import Source, Written, model_tensors, written
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices

# llama.cpp's numbers for the type of most tensors (llama.h: enum llama_ftype).
_FILE_TYPES = {F32.name: 0, F16.name: 1, Q4_0.name: 2, Q8_0.name: 7, BF16.name: 32}
_QUANTIZATION_VERSION = 2
# Of the tokenizer in a GGUF file that is not copied; llama.cpp then needs the size of vocabulary.
_NO_TOKENIZER = {"tokenizer.ggml.model": "no_vocab"}


def gguf_tensors(
    checkpoint: Checkpoint, config: ModelConfig, kind: BlockType, *, is_powerinfers: bool
) -> Iterator[Written]:
    """Yield the tensors in the order of the layers.

    PowerInfer's down matrices are transposed: a row is what a neuron adds to the output.
    """
    heads = {
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
    }
    for name, source in model_tensors(checkpoint, config):
        is_transposed = is_powerinfers and name.endswith("down_proj.weight")
        rows = stored_rows(name, source.shape[0], heads)
        order = None if rows is None else np.argsort(rows)
        yield written(
            gguf_name(name, TRANSPOSED if is_transposed else DOWN),
            kind,
            Source(source.tensor, source.factor, order, is_transposed),
        )


def metadata(
    checkpoint: Checkpoint,
    config: ModelConfig,
    kind: BlockType,
    notices: Notices,
    *,
    has_tokenizer: bool,
) -> dict[str, Any]:
    """Return a file's keys. Raises UnsupportedModel if GGUF cannot say what the tokenizer does."""
    keys: dict[str, Any] = {
        "general.architecture": config.family,
        "general.name": model_name(checkpoint.folder),
        "general.alignment": 32,
        "general.file_type": _FILE_TYPES[kind.name],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    keys |= {f"{config.family}.{key}": value for key, value in _sizes(config).items()}
    keys[KEY] = config.activation
    if config.activation == "fatrelu":
        keys[KEY] = f"fatrelu:{config.threshold!r}"
    source = read_gguf(checkpoint.folder) if is_gguf(checkpoint.folder) else None
    if source is not None:
        keys |= _copied(source, "general.", set(keys) - {"general.name"})
    if not has_tokenizer:
        return keys | _NO_TOKENIZER
    if source is not None:
        return keys | _copied(source, "tokenizer.", set())
    return keys | tokenizer_keys(checkpoint.folder, config, notices)


def _copied(source: GgufFile, prefix: str, known: set[str]) -> dict[str, bytes]:
    """Return keys of a GGUF file with their values as it stores them."""
    return {
        key: source.buffer[span]
        for key, span in source.spans.items()
        if key.startswith(prefix) and key not in known
    }


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of an architecture."""
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.n_layers,
        "feed_forward_length": config.n_neurons,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.head_dim * config.n_heads != config.hidden_size:
        sizes["attention.key_length"] = sizes["attention.value_length"] = config.head_dim
    if config.family == "minicpm":
        sizes["embedding_scale"] = float(config.embedding_scale)
        sizes["residual_scale"] = float(config.residual_scale)
        sizes["logit_scale"] = 1.0 / config.logit_scale
    return sizes
