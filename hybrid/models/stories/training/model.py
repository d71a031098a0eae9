"""The story model as a torch module: MiniCPM-S's architecture with a few million parameters.

This file has only the mathematics of training; `train.py` has data, schedule and files. The engine
never imports it. It reads the Hugging Face folder that `state_dict_for_export` fills.

The architecture is that of MiniCPM (https://arxiv.org/abs/2404.06395). Embeddings are multiplied by
`scale_emb`, and every residual branch by `scale_depth / sqrt(n_layers)`. Logits are computed from
`h / (hidden_size / dim_model_base)` through the tied embedding. The FFN is
`down(fatrelu(gate x) * up x)`, with FATReLU as in ProSparse (https://arxiv.org/abs/2402.13516).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class StoriesConfig:
    """Sizes and scales, with the names that a Hugging Face `config.json` uses."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 64

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_hf(self, threshold: float) -> dict[str, object]:
        """Return the dictionary of `config.json`; `threshold` is the FATReLU threshold."""
        return {
            "architectures": ["MiniCPMForCausalLM"],
            "model_type": "minicpm",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "fatrelu",
            "hidden_act_param": threshold,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **asdict(self),
        }


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape  # (batch, length, hidden)
        q = self.q_proj(x).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        group = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves as Hugging Face's Llama does. `x` is (batch, heads, length, head_dim)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class FFN(nn.Module):
    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        hidden, n_neurons = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, n_neurons, bias=False)
        self.up_proj = nn.Linear(hidden, n_neurons, bias=False)
        self.down_proj = nn.Linear(n_neurons, hidden, bias=False)

    def forward(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Return the output and the neuron activations `fatrelu(gate x) * up x`."""
        gate = self.gate_proj(x)
        gate = F.relu(gate) if threshold == 0.0 else gate * (gate >= threshold)
        activation = gate * self.up_proj(x)
        return self.down_proj(activation), activation


class Layer(nn.Module):
    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FFN(config)


class Stories(nn.Module):
    """The whole model. Its submodules are named as in a Hugging Face checkpoint under `model.`."""

    def __init__(self, config: StoriesConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.threshold = 0.0  # FATReLU threshold; 0 is plain ReLU
        for name, parameter in self.named_parameters():
            if name == "embed_tokens.weight":
                nn.init.normal_(parameter, std=1.0 / config.scale_emb)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[1]))

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean cross-entropy, and per layer the mean |activation| and active fraction.

        `ids` and `targets` are (batch, length).
        """
        config = self.config
        inverse = config.rope_theta ** (
            -torch.arange(0, config.head_dim, 2, device=ids.device) / config.head_dim
        )
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), inverse)
        cos, sin = angles.cos(), angles.sin()  # (length, head_dim / 2)
        branch = config.scale_depth / math.sqrt(config.num_hidden_layers)
        x = self.embed_tokens(ids) * config.scale_emb
        magnitudes, fractions = [], []
        for layer in self.layers:
            x = x + branch * layer.self_attn(layer.input_layernorm(x), cos, sin)
            y, activation = layer.mlp(layer.post_attention_layernorm(x), self.threshold)
            x = x + branch * y
            magnitudes.append(activation.abs().mean(dtype=torch.float32))
            with torch.no_grad():
                fractions.append(activation.count_nonzero() / activation.numel())
        h = self.norm(x) * (config.dim_model_base / config.hidden_size)
        logits = F.linear(h, self.embed_tokens.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return loss, torch.stack(magnitudes), torch.stack(fractions)

    def state_dict_for_export(self) -> dict[str, Tensor]:
        """Return bf16 tensors with Hugging Face names. The head is tied and therefore absent."""
        return {
            f"model.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in self.state_dict().items()
        }
