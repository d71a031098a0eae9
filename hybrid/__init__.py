"""hybrid runs ReLU-sparse language models fast on ordinary PCs.

import hybrid

with hybrid.load("stories") as engine:
    for piece in engine.generate("Once upon a time"):
        print(piece, end="", flush=True)
"""

# ruff: noqa: F403, F405 - __all__ lists the names of hybrid.public
from predictors import interrupts  # noqa: F401 - before all else, because then Ctrl-C prints no traceback

# isort: split
import importlib
import typing

from hybrid import kernels  # noqa: F401 - the compiled part: if it is missing, say so at once

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchLoop",
    "BatchPart",
    "BatchedGeneration",
    "ChatMessage",
    "ContextOverflow",
    "DeviceFailed",
    "DeviceUnavailable",
    "DownloadFailed",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Generation",
    "GenerationOptions",
    "GenerationStats",
    "HybridError",
    "InvalidArtifact",
    "InvalidCheckpoint",
    "InvalidOption",
    "LoadOptions",
    "MissingPackage",
    "ModelNotFound",
    "NumericOverflow",
    "Observation",
    "OutOfMemory",
    "Prediction",
    "Progress",
    "QueueFull",
    "Sampler",
    "SamplingParams",
    "Session",
    "TokenLogprobs",
    "ToolCall",
    "UnsupportedIsa",
    "UnsupportedModel",
    "active_isa",
    "load",
]

if typing.TYPE_CHECKING:
    from hybrid.public import *
else:

    def __getattr__(name: str) -> object:
        """Import the engine when one of its names is first used: that takes a third of a second."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module("hybrid.public"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
