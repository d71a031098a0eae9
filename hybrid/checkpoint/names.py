"""Names of stored tensors: which of them is which tensor of the family.

Training tools wrap modules and save the wrappers' names. A base model is saved without the prefix
that it has within a model for generation. transformers accepts the latter, and so does this file;
wrappers it accepts in addition.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from hybrid.errors import InvalidCheckpoint

_PREFIX = "model."  # of all tensors but the head's
# torch.compile, DistributedDataParallel, fully sharded data parallel, activation checkpointing.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that are computed from config.json, whatever the file holds.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|(cos|sin)_cached)|position_ids)$")


class MatchedNames(NamedTuple):
    stored: dict[str, str]  # the family's name → the name in the files
    unused: list[str]  # stored, but not the family's; without known buffers

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """Pairs of the name in the files and the family's, where they differ."""
        return [(stored, name) for name, stored in self.stored.items() if stored != name]


def match_names(expected: Collection[str], stored: Collection[str]) -> MatchedNames:
    """Find the family's tensors among the stored ones. A missing one has no entry.

    A name that is exactly the family's wins over one with a wrapper or without the prefix. Raises
    InvalidCheckpoint if two names mean the same tensor.
    """
    found = {name: name for name in expected if name in stored}
    unused = []
    for name in sorted(set(stored) - found.keys()):
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        meant = bare if bare in expected else _PREFIX + bare
        if meant not in expected or found.get(meant) == meant:
            if not _BUFFERS.search(bare):
                unused.append(name)
        elif meant in found:
            raise InvalidCheckpoint(
                f"tensors {found[meant]!r} and {name!r} both stand for {meant!r}"
            )
        else:
            found[meant] = name
    return MatchedNames(found, unused)
