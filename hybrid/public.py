"""What `hybrid.__all__` lists. Importing this module imports the whole engine."""

# ruff: noqa: F401
from __future__ import annotations

from hybrid.engine.answer import TokenLogprobs
from hybrid.engine.batch.batched_generation import BatchedGeneration
from hybrid.engine.batch.loop import BatchLoop
from hybrid.engine.batch.passes import Batch, BatchPart
from hybrid.engine.engine import Engine
from hybrid.engine.generation import Generation
from hybrid.engine.loading.prediction import Prediction
from hybrid.engine.options import GenerationOptions, LoadOptions
from hybrid.engine.session import Observation, Session
from hybrid.engine.stats import EngineStats, GenerationStats
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
    QueueFull,
    UnsupportedIsa,
    UnsupportedModel,
)
from hybrid.hub.loading import load
from hybrid.kernels import active_isa
from hybrid.progress import Progress
from hybrid.text.chat import ChatMessage
from hybrid.text.sampling import Sampler, SamplingParams
from hybrid.text.tool_calls import ToolCall
