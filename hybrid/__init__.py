"""hybrid runs ReLU-sparse language models fast on ordinary PCs.

import hybrid

with hybrid.load("stories") as engine:
    for piece in engine.generate("Once upon a time"):
        print(piece, end="", flush=True)
"""

from hybrid.engine.engine import Engine, EngineStats
from hybrid.engine.generation import Generation, GenerationStats, TokenLogprobs
from hybrid.engine.loading.prediction import Prediction
from hybrid.engine.options import GenerationOptions, LoadOptions
from hybrid.engine.session import Observation, Session
from hybrid.errors import (
    ContextOverflow,
    DeviceFailed,
    DeviceUnavailable,
    DownloadFailed,
    EngineClosed,
    HybridError,
    InvalidArtifact,
    InvalidCheckpoint,
    InvalidOption,
    MissingPackage,
    ModelNotFound,
    NumericOverflow,
    OutOfMemory,
    UnsupportedIsa,
    UnsupportedModel,
)
from hybrid.hub.loading import load
from hybrid.kernels import active_isa
from hybrid.progress import Progress
from hybrid.text.sampling import Sampler, SamplingParams
from hybrid.text.tokenizer import ChatMessage

__version__ = "0.1.0"

__all__ = [
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
    "Sampler",
    "SamplingParams",
    "Session",
    "TokenLogprobs",
    "UnsupportedIsa",
    "UnsupportedModel",
    "active_isa",
    "load",
]
