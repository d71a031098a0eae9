"""Which files of a repository make a model, and how long each may be."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from hybrid.checkpoint.hf import MAX_SHARDS
from hybrid.checkpoint.json_file import read_object
from hybrid.errors import InvalidCheckpoint
from hybrid.text.template_files import MAX_NAMED, NAMED

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first that exists is used
# All of them decide how text becomes tokens or which tokens follow. A model may lack any of them.
OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TEMPLATE = re.compile(NAMED + r"/[\w-]{1,80}\.jinja")
WEIGHTS = (  # the first that exists is used; an index names its shards
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
# What a reader of these files accepts. A vocabulary of 250,000 pieces has 20 MB, the index of
# 100,000 tensors 10 MB.
MAX_CONFIG_BYTES, MAX_VOCABULARY_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20, 64 << 20


def select(available: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files to use, with the weights or their index last, and the missing ones."""
    files = [CONFIG] if CONFIG in available else []
    missing = [] if files else [CONFIG]
    for what, choices in (("a tokenizer", TOKENIZERS), ("weights", WEIGHTS)):
        files += [name for name in choices if name in available][:1]
        if not set(files).intersection(choices):
            missing.append(f"{what} ({' or '.join(choices)})")
    templates = sorted(filter(_TEMPLATE.fullmatch, available))[:MAX_NAMED]
    files[1:1] = [name for name in OPTIONAL if name in available] + templates
    return files, missing


def shards_of(weights: Path) -> list[str]:
    """Return the files that an index of weights names; none if `weights` is not an index.

    Raises InvalidCheckpoint.
    """
    if not weights.name.endswith(INDEX):
        return []
    weight_map = read_object(weights, MAX_INDEX_BYTES).get("weight_map")
    if isinstance(weight_map, dict) and all(map(_is_shard, weight_map.values())):
        shards = sorted(set(weight_map.values()))
        if 0 < len(shards) <= MAX_SHARDS:
            return shards
    raise InvalidCheckpoint(
        f"{weights} is broken: expected a JSON object whose weight_map gives each tensor the name "
        "of a .safetensors or .bin file beside it"
    )


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name))


def size_limit(name: str) -> int | None:
    """Return how long a file may be; None: as long as the disk has room."""
    if name in TOKENIZERS:
        return MAX_VOCABULARY_BYTES
    if name.endswith(INDEX):
        return MAX_INDEX_BYTES
    if name == CONFIG or name in OPTIONAL or _TEMPLATE.fullmatch(name):
        return MAX_CONFIG_BYTES
    return None
