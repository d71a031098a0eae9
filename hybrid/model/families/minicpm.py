"""MiniCPM: Llama with scales of the embedding, the residual branches and the logits."""

from __future__ import annotations

import math
from dataclasses import replace

from hybrid.model.config import ModelConfig
from hybrid.model.families import llama
from hybrid.model.families.fields import Fields

NAME = "minicpm"
MODEL_TYPES = {"MiniCPMForCausalLM": "minicpm"}
MODEL_TENSORS, LAYER_TENSORS = llama.MODEL_TENSORS, llama.LAYER_TENSORS


def parse(fields: Fields) -> ModelConfig:
    """Parse config.json. Raises InvalidCheckpoint, UnsupportedModel."""
    fields = fields.with_defaults(llama.CLASS_DEFAULTS)
    config = llama.parse_transformer(fields, NAME, is_tied_by_default=True)
    # An absent key means 1, as in the model's own configuration class.
    return replace(
        config,
        embedding_scale=fields.number("scale_emb", 1.0),
        residual_scale=fields.number("scale_depth", 1.0) / math.sqrt(config.n_layers),
        logit_scale=fields.number("dim_model_base", 1.0) / config.hidden_size,
    )
