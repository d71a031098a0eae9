"""Model families: the meaning of their config.json, and the names of their tensors.

There is one file per family. This package owns everything in which families differ, and the Hugging
Face names. All other code knows only roles ("gate", "attention_norm") and `ModelConfig`. This
package opens no files.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families import llama, minicpm
from hybrid.model.families.fields import Fields, parse_token_ids

__all__ = ["ExpectedTensor", "expected_tensors", "parse_config", "parse_token_ids"]

_FAMILIES = (minicpm, llama)
_BY_NAME = {family.NAME: family for family in _FAMILIES}
_BY_ARCHITECTURE = {name: family for family in _FAMILIES for name in family.ARCHITECTURES}


class ExpectedTensor(NamedTuple):
    role: str
    layer: int | None
    name: str
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Yield every tensor of the model. A tied head is not a tensor of its own."""
    family = _BY_NAME[config.family]
    hidden, neurons = config.hidden_size, config.n_neurons
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "embedding": (config.vocab_size, hidden),
        "norm": (hidden,),
        "head": (config.vocab_size, hidden),
        "attention_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (neurons, hidden),
        "up": (neurons, hidden),
        "down": (hidden, neurons),
    }
    for role, name in family.MODEL_TENSORS.items():
        if role != "head" or not config.has_tied_head:
            yield ExpectedTensor(role, None, f"{name}.weight", shapes[role])
    for layer in range(config.n_layers):
        for role, name in family.LAYER_TENSORS.items():
            yield ExpectedTensor(role, layer, f"model.layers.{layer}.{name}.weight", shapes[role])


def parse_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Parse the content of config.json. `path` is for messages.

    Raises InvalidCheckpoint, UnsupportedModel.
    """
    fields = Fields(config, path)
    return _BY_ARCHITECTURE[_architecture(fields)].parse(fields)


def _architecture(fields: Fields) -> str:
    known = ", ".join(_BY_ARCHITECTURE)
    match fields.values.get("architectures"):
        case [str(architecture), *_]:
            pass
        case _:
            raise fields.invalid("architectures", f"a list with one of {known}")
    if architecture not in _BY_ARCHITECTURE:
        raise UnsupportedModel(
            f"{fields.path}: architecture {reprlib.repr(architecture)} is unknown; this engine "
            f"runs {known}"
        )
    return architecture
