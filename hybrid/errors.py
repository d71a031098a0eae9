"""Every exception that hybrid raises for a user's mistake or a broken file.

    HybridError
    ├── ModelNotFound        no such name or folder, or not here and not to be fetched
    ├── DownloadFailed       a file could not be fetched, or what came does not match its checksum
    ├── InvalidCheckpoint    a model's files are broken, incomplete or contradict each other
    ├── InvalidArtifact      a profile, trace or predictor is broken, or of another model or order
    ├── UnsupportedModel     a sound model that this engine does not run
    ├── UnsupportedIsa       an instruction set that this CPU or this build lacks
    ├── InvalidOption        an option's value is out of range (also a ValueError)
    ├── ContextOverflow      the prompt does not fit into the context
    ├── OutOfMemory          the model or a context does not fit into this machine's memory
    ├── DeviceUnavailable    a GPU was asked for, and there is none that hybrid can use
    ├── DeviceFailed         the GPU failed or did not answer: load the model again
    ├── MissingPackage       an optional package is needed for this, and is not installed
    └── EngineClosed         the engine or session was used after it was closed

A message says what is wrong, what was expected, what was found, and what to do.
"""

from __future__ import annotations


class HybridError(Exception):
    """Root of all exceptions that the library raises on purpose."""


class ModelNotFound(HybridError):
    """The model's name or folder is unknown here and cannot be fetched."""


class DownloadFailed(HybridError):
    """A model's file could not be fetched, or does not match its checksum."""


class InvalidCheckpoint(HybridError):
    """A model's files are broken, incomplete or contradict each other."""


class InvalidArtifact(HybridError):
    """A profile, trace or predictor is broken, or belongs to another model or neuron order."""


class UnsupportedModel(HybridError):
    """The model is sound, but this engine does not run it."""


class UnsupportedIsa(HybridError):
    """The instruction set is unknown, or this CPU or this build lacks it."""


class InvalidOption(HybridError, ValueError):
    """An option's value is out of range."""


class ContextOverflow(HybridError):
    """The prompt does not fit into the context."""


class OutOfMemory(HybridError):
    """The model or a context does not fit into this machine's memory."""


class DeviceUnavailable(HybridError):
    """A GPU was asked for, and there is none here that hybrid can use."""


class DeviceFailed(HybridError):
    """The GPU reported an error or did not answer; what it holds cannot be trusted any more."""


class MissingPackage(HybridError):
    """An optional package is needed for this, and is not installed."""


class EngineClosed(HybridError):
    """The engine or session was used after it was closed."""
