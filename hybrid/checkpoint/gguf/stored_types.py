"""Which format a GGUF file's weights are packed to, and what a user should know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hybrid.checkpoint.gguf.weights import GgufWeights
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.weights.formats import DEFAULT_FORMAT, has_blocks
from hybrid.weights.layout import packed_layout

# Formats of ours whose values are those of a type of GGUF.
_SAME_AS = {Format.bf16: "BF16", Format.f16: "F16", Format.q8: "Q8_0", Format.q4: "Q4_0"}
_COARSE = ("Q2_K", "Q3_K")  # no better than q4; the other types lose less in q8


def usual_format(n_weights: Mapping[str, int]) -> Format:
    """Return the format that suits the type of most weights."""
    most = max(n_weights, key=n_weights.__getitem__)
    for format, name in _SAME_AS.items():
        if name == most:
            return format
    return Format.q4 if most in _COARSE else DEFAULT_FORMAT


def type_notices(
    weights: GgufWeights, config: ModelConfig, format: Format, *, is_chosen: bool
) -> Iterator[str]:
    """Yield what the file's types and the format mean. `is_chosen` says that the user chose it."""
    name, types = weights.paths[0].name, sorted(weights.n_weights)
    stored = f"{name}: its weights are stored as {', '.join(types)}"
    if not is_chosen:
        n_bytes = packed_layout(config, format).n_bytes
        yield f"{stored}; they run as {format.name} in {n_bytes / 1e6:.0f} MB{_smaller(format)}"
    elif types != [_SAME_AS[format]]:
        yield f"{stored} and packed to {format.name} (--quant)"
    if has_blocks(format) and _SAME_AS[format] in weights.down_types:
        yield (
            f"{name}: ffn_down is rounded once more: its blocks run along neurons, and those of "
            "hybrid along the other side, so that neurons can be skipped"
        )


def _smaller(format: Format) -> str:
    if format is Format.q4:
        return ""
    smaller = "q4" if format is Format.q8 else "q8"
    return f" (--quant {smaller} takes about half of it and is faster)"
