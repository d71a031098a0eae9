"""hybrid: runs ReLU-sparse language models fast on ordinary PCs.

import hybrid

with hybrid.load("stories") as engine:
    for piece in engine.generate("Once upon a time"):
        print(piece, end="", flush=True)
"""

from hybrid.engine.engine import Engine
from hybrid.engine.generation import Generation, GenerationStats
from hybrid.errors import (
    ContextOverflow,
    DownloadFailed,
    EngineClosed,
    HybridError,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedIsa,
    UnsupportedModel,
)
from hybrid.kernels import active_isa
from hybrid.loading import load

__all__ = [
    "ContextOverflow",
    "DownloadFailed",
    "Engine",
    "EngineClosed",
    "Generation",
    "GenerationStats",
    "HybridError",
    "InvalidCheckpoint",
    "InvalidOption",
    "ModelNotFound",
    "UnsupportedIsa",
    "UnsupportedModel",
    "active_isa",
    "load",
]
