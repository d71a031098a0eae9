"""Write a dense GGUF file with random weights in a model's shape, for engines that read GGUF.

Every matrix has the one requested type, even the tied embedding. So bytes per token are comparable
with ours. The architecture is `llama`, with SiLU and no scales; it costs as much as ReLU with
scales. Blocks are those of ggml: an fp16 scale and 32 int8 (Q8_0), or an fp16 scale and 32 nibbles
(Q4_0). Needs the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from hybrid.model.config import ModelConfig

TYPES = {
    "q4": gguf.GGMLQuantizationType.Q4_0,
    "q8": gguf.GGMLQuantizationType.Q8_0,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    "q4": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}
BLOCK = 32


def matrix_shapes(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and columns of every matrix."""
    hidden, n_neurons, head_dim = config.hidden_size, config.n_neurons, config.head_dim
    kv = config.n_kv_heads * head_dim
    yield "token_embd", config.vocab_size, hidden
    for layer in range(config.n_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_q", config.n_heads * head_dim, hidden
        yield f"{block}.attn_k", kv, hidden
        yield f"{block}.attn_v", kv, hidden
        yield f"{block}.attn_output", hidden, config.n_heads * head_dim
        yield f"{block}.ffn_gate", n_neurons, hidden
        yield f"{block}.ffn_up", n_neurons, hidden
        yield f"{block}.ffn_down", hidden, n_neurons


def row_bytes(quant: str, n_cols: int) -> int:
    block_bytes = {"q4": 2 + BLOCK // 2, "q8": 2 + BLOCK, "bf16": 2 * BLOCK}
    return n_cols // BLOCK * block_bytes[quant]


def bytes_per_token(config: ModelConfig, quant: str) -> int:
    """Return the bytes of weights that dense decoding reads for one token.

    It reads every matrix once. The embedding is also the head.
    """
    return sum(n_rows * row_bytes(quant, n_cols) for _, n_rows, n_cols in matrix_shapes(config))


def write_dense_gguf(path: Path, config: ModelConfig, quant: str, seed: int = 0) -> None:
    """Write the file. If writing fails, raises OSError and leaves nothing under `path`."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama", use_temp_file=False)
    try:
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(config.n_neurons)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_file_type(FILE_TYPES[quant])
        writer.add_tokenizer_model("none")
        rng = np.random.default_rng(seed)
        for name, n_rows, n_cols in matrix_shapes(config):
            writer.add_tensor(
                f"{name}.weight", _random_rows(rng, quant, n_rows, n_cols), raw_dtype=TYPES[quant]
            )
        norms = [f"blk.{i}.{kind}_norm" for i in range(config.n_layers) for kind in ("attn", "ffn")]
        for name in [*norms, "output_norm"]:
            writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _random_rows(
    rng: np.random.Generator, quant: str, n_rows: int, n_cols: int
) -> NDArray[np.uint8]:
    """Random ggml blocks whose weights have a standard deviation of about 1 / sqrt(n_cols)."""
    deviation = n_cols**-0.5
    n_blocks = n_rows * n_cols // BLOCK
    if quant == "bf16":
        w = rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(deviation)
        return (w.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    integers = {"q4": 4.6, "q8": 73.9}[quant]  # standard deviation of uniform nibbles and int8
    blocks = np.empty((n_blocks, row_bytes(quant, BLOCK)), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(deviation / integers).tobytes(), np.uint8)
    blocks[:, 2:] = rng.integers(0, 256, (n_blocks, blocks.shape[1] - 2), np.uint8)
    return blocks.reshape(n_rows, -1)
