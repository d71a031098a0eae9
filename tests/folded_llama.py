"""Express a MiniCPM as a Llama for transformers, which knows neither its scales nor FATReLU.

The scales are folded into the weights, and FATReLU is a torch module. Needs torch.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_models import STORIES

torch = pytest.importorskip("torch")


class FatRelu(torch.nn.Module):
    """x if x >= threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= self.threshold, x, torch.zeros_like(x))


def fold_scales(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fold a MiniCPM's embedding, residual and logit scales into an untied Llama's weights."""
    branch = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    folded = {
        name: tensor * np.float32(branch)
        if name.endswith(("o_proj.weight", "down_proj.weight"))
        else tensor
        for name, tensor in tensors.items()
    }
    folded["lm_head.weight"] = head * np.float32(config["dim_model_base"] / config["hidden_size"])
    folded["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float32(
        config["scale_emb"]
    )
    return folded


def folded_stories() -> Any:
    """Return transformers' LlamaForCausalLM with the bundled model's weights in fp32."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = json.loads((STORIES / "config.json").read_text())
    with safe_open(STORIES / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    functions = transformers.activations.ACT2FN
    functions["fatrelu_stories"] = (FatRelu, {"threshold": config["hidden_act_param"]})
    try:
        changes = {"hidden_act": "fatrelu_stories", "tie_word_embeddings": False}
        kept = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**(kept | changes), attn_implementation="eager")
        ).eval()
    finally:
        del functions["fatrelu_stories"]
    folded = fold_scales(config, tensors)
    model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in folded.items()})
    return model
