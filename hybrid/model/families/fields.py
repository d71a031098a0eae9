"""Typed access to config.json, with an error message for each invalid value.

This module knows no family. It reads what all families' configs state in the same form: heads,
rotary positions, activation and ids.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.model.config import Activation

ACTIVATIONS: tuple[Activation, ...] = ("relu", "fatrelu", "silu")
_MAX_SIZE = 2**31 - 1  # the kernels use 32-bit integers
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def parse_token_ids(value: object, key: str, vocab_size: int, path: Path) -> tuple[int, ...]:
    """Parse token ids: one number, a list of numbers, or null. `key` and `path` are for messages.

    Raises InvalidCheckpoint.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise InvalidCheckpoint(
            f"{path}: {key} is {reprlib.repr(value)}; expected ids from 0 to {vocab_size - 1}"
        )
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to config.json. `null` counts as absent, as it does in transformers."""

    values: dict[str, Any]
    path: Path

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.invalid(key, f"a whole number from 1 to {_MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_number(value) or not 0 < value <= _MAX_FLOAT32:
            raise self.invalid(key, "a positive, finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def invalid(self, key: str, expected: str) -> InvalidCheckpoint:
        value = self.values.get(key)
        return InvalidCheckpoint(
            f"{self.path}: {key} is {reprlib.repr(value)}; expected {expected}"
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise InvalidCheckpoint(f"{self.path}: has no {key}")
        return value


def read_heads(fields: Fields, hidden_size: int) -> tuple[int, int, int]:
    """Return (n_heads, n_kv_heads, head_dim). Raises InvalidCheckpoint, UnsupportedModel."""
    n_heads = fields.size("num_attention_heads")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
    if fields.values.get("head_dim") is None and hidden_size % n_heads:
        raise fields.invalid("num_attention_heads", f"a divisor of hidden_size, {hidden_size}")
    head_dim = fields.size("head_dim", hidden_size // n_heads)
    if head_dim % 2:
        raise UnsupportedModel(
            f"{fields.path}: heads have {head_dim} dimensions; expected an even number, because "
            "rotary positions rotate dimensions in pairs"
        )
    if n_heads * head_dim > _MAX_SIZE:
        raise fields.invalid("num_attention_heads", f"at most {_MAX_SIZE} dimensions in all")
    return n_heads, n_kv_heads, head_dim


def read_activation(fields: Fields) -> Activation:
    name = fields.values.get("hidden_act")
    for activation in ACTIVATIONS:
        if name == activation:
            return activation
    raise UnsupportedModel(
        f"{fields.path}: hidden_act {reprlib.repr(name)} is unknown; this engine runs "
        f"{', '.join(ACTIVATIONS)}"
    )


def read_threshold(fields: Fields) -> float:
    value = fields.values.get("hidden_act_param")
    if not _is_number(value) or not 0 <= value <= _MAX_FLOAT32:
        raise fields.invalid("hidden_act_param", "fatrelu's threshold, a number of at least 0")
    return float(value)


def read_rope_theta(fields: Fields) -> float:
    # transformers 5 writes theta and scaling as one object. Earlier versions wrote two keys.
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.invalid(key, "an object or null")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default") or rope.get("partial_rotary_factor", 1) not in (None, 1):
            raise UnsupportedModel(
                f"{fields.path}: {key} is {reprlib.repr(rope)}; this engine runs plain rotary "
                "positions only, of type default"
            )
    if rope is not None:
        return Fields(rope, fields.path).number("rope_theta")
    return fields.number("rope_theta", 10000.0)


def read_bos_id(fields: Fields, vocab_size: int) -> int | None:
    # If config.json lacks the key, the classes of all families use 1, and 2 for eos_token_id.
    ids = parse_token_ids(
        fields.values.get("bos_token_id", 1), "bos_token_id", vocab_size, fields.path
    )
    return ids[0] if ids else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)
