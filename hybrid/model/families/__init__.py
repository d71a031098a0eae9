"""Model families: the meaning of their config.json, and the names of their tensors.

There is one file per family. This package owns everything in which families differ, and the Hugging
Face names. All other code knows only roles ("gate", "attention_norm") and `ModelConfig`. This
package opens no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families import llama, minicpm
from hybrid.model.families.fields import Fields
from hybrid.model.families.refusals import refuse_unused
from hybrid.notices import Notices, short_list

__all__ = [
    "ExpectedTensor",
    "expected_tensors",
    "parse_config",
    "refuse_unused",
]

_FAMILIES = (minicpm, llama)
_BY_NAME = {family.NAME: family for family in _FAMILIES}
_BY_ARCHITECTURE = {name: family for family in _FAMILIES for name in family.MODEL_TYPES}
_BY_MODEL_TYPE = {
    model_type: name for family in _FAMILIES for name, model_type in family.MODEL_TYPES.items()
}
_WITHOUT_HEAD = {"LlamaModel": "LlamaForCausalLM", "MiniCPMModel": "MiniCPMForCausalLM"}


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


def parse_config(config: dict[str, Any], path: Path, notices: Notices | None = None) -> ModelConfig:
    """Parse the content of config.json. `path` is for messages.

    `notices` receives a line for each thing that is read otherwise than it is written. Raises
    InvalidCheckpoint, UnsupportedModel.
    """
    fields = Fields(config, path, Notices() if notices is None else notices)
    architecture = _architecture(fields)
    fields = replace(fields, values={**config, "architectures": [architecture]})
    return _BY_ARCHITECTURE[architecture].parse(fields)


def _architecture(fields: Fields) -> str:
    """Return the name of the class for generation, as AutoModelForCausalLM chooses it."""
    known = ", ".join(_BY_ARCHITECTURE)
    model_type = fields.values.get("model_type")
    match fields.values.get("architectures"):
        case [str(architecture), *_]:
            pass
        case None | [] if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
            architecture = _BY_MODEL_TYPE[model_type]
            fields.notices.add(
                f"{fields.path.name}: has no architectures; its model_type {model_type!r} is that "
                f"of {architecture}"
            )
        case _:
            raise fields.invalid("architectures", f"a list with one of {known}")
    if architecture in _WITHOUT_HEAD:
        fields.notices.add(
            f"{fields.path.name}: {architecture} was saved without its head; it is read as "
            f"{_WITHOUT_HEAD[architecture]}, as transformers does"
        )
        return _WITHOUT_HEAD[architecture]
    if architecture not in _BY_ARCHITECTURE:
        raise UnsupportedModel(
            f"{fields.path}: architecture {short_list([architecture])} is unknown; this engine "
            f"runs {known}"
        )
    return architecture
