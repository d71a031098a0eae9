"""Executors of tiny models, for tests below the engine."""

from __future__ import annotations

from pathlib import Path

from tiny_models import ODD_SHAPES

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.kernels import Format
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import pack_model

VARIANTS = {
    "minicpm": {},
    "relu": {"hidden_act": "relu", "hidden_act_param": None},
    "silu": {"hidden_act": "silu", "hidden_act_param": None},
    "untied": {"tie_word_embeddings": False},
    "mha": {"num_key_value_heads": 6},
    "odd sizes": {"head_dim": 48, "intermediate_size": 131, "vocab_size": 333},
    "few neurons": {"intermediate_size": 7},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "relu",
        "hidden_act_param": None,
        "hidden_size": 256,
        "num_attention_heads": 4,
    },
    **ODD_SHAPES,
}


def open_executor(
    folder: Path, format: Format, n_threads: int = 2, n_context: int = 600, orders=None
) -> CpuExecutor:
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, format)
        model = pack_model(checkpoint, layout, neuron_orders=orders)
        return CpuExecutor(model, layout, n_threads=n_threads, n_context=n_context)
