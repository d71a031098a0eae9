"""The transformer, written once.

This one definition has three users. The reference executes it in NumPy. The CPU executor records
it into a native program. The GPU executor captures it into a CUDA graph. Each user has its own
operations. Measurements run it too, and the calibration of synthetic models runs its layers.
Operations are fused stages:

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


class LayerOperations(Protocol[Matrix, X, Q]):
    def qkv(self, x: X, weights: LayerWeights[Matrix], layer: int) -> Q: ...
    def attend(self, x: X, q: Q, weights: LayerWeights[Matrix], layer: int, scale: float) -> X: ...
    def ffn(self, x: X, weights: LayerWeights[Matrix], layer: int, scale: float) -> X: ...


class Operations(LayerOperations[Matrix, X, Q], Protocol[Matrix, X, Q, Logits]):
    def embed(self, weights: ModelWeights[Matrix], scale: float) -> X: ...
    def head(self, x: X, weights: ModelWeights[Matrix], scale: float) -> Logits: ...


def forward(
    ops: Operations[Matrix, X, Q, Logits], weights: ModelWeights[Matrix], config: ModelConfig
) -> Logits:
    """Run the model over the tokens that `ops` holds. Return their logits."""
    x = ops.embed(weights, config.embedding_scale)
    for layer, layer_weights in enumerate(weights.layers):
        x = forward_layer(ops, x, layer_weights, layer, config.residual_scale)
    return ops.head(x, weights, config.logit_scale)


def forward_layer(
    ops: LayerOperations[Matrix, X, Q],
    x: X,
    weights: LayerWeights[Matrix],
    layer: int,
    scale: float,
) -> X:
    """Run one layer, and return the residual stream after it."""
    q = ops.qkv(x, weights, layer)
    x = ops.attend(x, q, weights, layer, scale)
    return ops.ffn(x, weights, layer, scale)
