"""The transformer, written once.

This one definition has three users. The reference executes it in NumPy. The CPU executor records
it into a native program. The GPU executor captures it into a CUDA graph. Each user has its own
operations. Operations are fused stages:

    embed   x = embedding[token] * scale
    qkv     norm, q k v projections, rope, KV-cache write
    attend  attention over the cache, output projection, residual
    ffn     norm, gated sparse FFN, residual
    head    norm, logits
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from hybrid.model.config import ModelConfig
from hybrid.model.weights import LayerWeights, ModelWeights

Matrix = TypeVar("Matrix")
X = TypeVar("X")  # the residual stream
Q = TypeVar("Q")  # the queries of one layer
Logits = TypeVar("Logits", covariant=True)


class Operations(Protocol[Matrix, X, Q, Logits]):
    def embed(self, weights: ModelWeights[Matrix], scale: float) -> X: ...
    def qkv(self, x: X, weights: LayerWeights[Matrix], layer: int) -> Q: ...
    def attend(self, x: X, q: Q, weights: LayerWeights[Matrix], layer: int, scale: float) -> X: ...
    def ffn(self, x: X, weights: LayerWeights[Matrix], layer: int, scale: float) -> X: ...
    def head(self, x: X, weights: ModelWeights[Matrix], scale: float) -> Logits: ...


def forward(
    ops: Operations[Matrix, X, Q, Logits], weights: ModelWeights[Matrix], config: ModelConfig
) -> Logits:
    """Run the model over the tokens that `ops` holds. Return their logits."""
    x = ops.embed(weights, config.embedding_scale)
    for layer, layer_weights in enumerate(weights.layers):
        q = ops.qkv(x, layer_weights, layer)
        x = ops.attend(x, q, layer_weights, layer, config.residual_scale)
        x = ops.ffn(x, layer_weights, layer, config.residual_scale)
    return ops.head(x, weights, config.logit_scale)
