"""Typed access to config.json, with an error message for each invalid value.

This module knows no family. It reads what all families' configs state in the same form: heads,
rotary positions, activation and ids.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.model.config import Activation
from hybrid.notices import Notices, short_list

ACTIVATIONS: tuple[Activation, ...] = ("relu", "fatrelu", "silu")
_MAX_SIZE = 2**31 - 1  # the kernels use 32-bit integers
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def parse_token_ids(
    value: object, key: str, vocab_size: int, path: Path, notices: Notices
) -> tuple[int, ...]:
    """Parse token ids: one number, a list of numbers, or null.

    Ids that the vocabulary lacks, such as the common -1, are left out with a notice: no token ever
    equals them. `key` and `path` are for messages. Raises InvalidCheckpoint.
    """
    given: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    ids: list[int] = [token for token in given if type(token) is int]
    if len(ids) < len(given):
        raise InvalidCheckpoint(
            f"{path}: {key} is {reprlib.repr(value)}; expected ids from 0 to {vocab_size - 1}"
        )
    known = tuple(token for token in ids if 0 <= token < vocab_size)
    if len(known) < len(ids):
        notices.add(
            f"{path.name}: {key} {reprlib.repr(value)} is not in the vocabulary, whose ids end at "
            f"{vocab_size - 1}; it is ignored"
        )
    return known


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to config.json. `null` counts as absent, as it does in transformers."""

    values: Mapping[str, Any]
    path: Path
    notices: Notices = field(default_factory=Notices)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """Return the fields with their class's defaults for absent ones; a notice names those."""
        absent = {key: value for key, value in defaults.items() if self.values.get(key) is None}
        if absent:
            used = ", ".join(f"{key} {value!r}" for key, value in absent.items())
            self.notices.add(
                f"{self.path.name}: lacks {', '.join(absent)}; the defaults of its class in "
                f"transformers are used: {used}"
            )
        return replace(self, values={**self.values, **absent})

    def token_ids(self, key: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        value = self.values.get(key, default)
        return parse_token_ids(value, key, vocab_size, self.path, self.notices)

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
    """Return theta of plain rotary positions, by the precedence of transformers 5.

    A `rope_scaling` that is not empty replaces `rope_parameters`. Theta inside of it wins over
    theta at the top level, and 10000 is the default (`convert_rope_params_to_dict` in
    transformers/modeling_rope_utils.py). Raises InvalidCheckpoint, UnsupportedModel.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.values.get(key), (dict, type(None))):
            raise fields.invalid(key, "an object or null")
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = fields.values.get(key) or {}
    _check_plain_rope(fields, key, rope)
    inner = Fields(rope, fields.path)
    theta = fields.number("rope_theta", 10000.0)
    if rope.get("rope_theta") is None:
        return theta
    if fields.values.get("rope_theta") is not None and inner.number("rope_theta") != theta:
        fields.notices.add(
            f"{fields.path.name}: rope_theta {theta:g} is ignored: {key} has "
            f"{inner.number('rope_theta'):g}, which wins in transformers too"
        )
    return inner.number("rope_theta")


def _check_plain_rope(fields: Fields, key: str, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    kind = rope.get("type") if kind is None else kind
    is_per_layer = any(isinstance(value, dict) for value in rope.values())
    is_partial = rope.get("partial_rotary_factor") not in (None, 1)
    if kind not in (None, "default") or is_per_layer or is_partial:
        raise UnsupportedModel(
            f"{fields.path}: {key} is {reprlib.repr(rope)}; this engine runs plain rotary "
            "positions only, of type default and the same in all layers"
        )
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    ignored = [name for name, value in rope.items() if name not in known and value is not None]
    if ignored:
        fields.notices.add(
            f"{fields.path.name}: {key} is of type default, in which transformers ignores "
            f"{short_list(ignored)}, and so does hybrid"
        )


def read_special_ids(fields: Fields, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the ids of BOS (or None) and of the end tokens.

    If config.json lacks a key, the classes of all families use 1 and 2. Other special ids, such as
    that of padding, are never used; a notice names those that are not in the vocabulary. Raises
    InvalidCheckpoint.
    """
    bos_ids = fields.token_ids("bos_token_id", vocab_size, 1)
    eos_ids = fields.token_ids("eos_token_id", vocab_size, 2)
    strange = [
        f"{key} {value}"
        for key, value in fields.values.items()
        if key.endswith("_token_id")
        and key not in ("bos_token_id", "eos_token_id")
        and type(value) is int
        and not 0 <= value < vocab_size
    ]
    if strange:
        fields.notices.add(
            f"{fields.path.name}: {short_list(strange)}: not in the vocabulary, whose ids end at "
            f"{vocab_size - 1}, and not used"
        )
    return (bos_ids[0] if bos_ids else None), eos_ids


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)
