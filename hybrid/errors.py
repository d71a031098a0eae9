"""The exceptions that hybrid raises for a user's mistake or a broken file.

    HybridError
    ├── ModelNotFound        the model's name or folder is unknown, or it may not be downloaded
    ├── DownloadFailed       a file could not be downloaded, or does not match its checksum
    ├── InvalidCheckpoint    a model's files are broken, incomplete or contradict each other
    ├── InvalidArtifact      a file of our own is broken, or is for another model
    ├── UnsupportedModel     the model is sound, but this engine does not run it
    ├── UnsupportedIsa       this CPU or this build lacks the instruction set
    ├── InvalidOption        an option's value is out of range (also a ValueError)
    ├── ContextOverflow      the prompt does not fit into the context
    ├── NumericOverflow      a number exceeds the range of its format, or is not finite
    ├── QueueFull            a batching loop has as many waiting requests as it takes
    ├── OutOfMemory          the model or a context does not fit into this machine's memory
    ├── DeviceUnavailable    a GPU was requested, but there is none that hybrid can use
    ├── DeviceFailed         the GPU failed or did not answer; load the model again
    ├── MissingPackage       an optional package is needed, and is not installed
    └── EngineClosed         the engine or session was used after it was closed

A message says what is wrong, what was expected, what was found, and what to do.
"""

from __future__ import annotations


def one_line(text: object, most: int = 300) -> str:
    """Return what a file or another library says, as a part of a message.

    It has no line breaks or other characters that cannot be shown, and at most `most` characters.
    """
    encoded = str(text)[: 4 * most].encode(errors="backslashreplace").decode()  # lone surrogates
    shown = (character if character.isprintable() else " " for character in encoded)
    return " ".join("".join(shown).split())[:most]


class HybridError(Exception):
    """The root of all exceptions that the library raises on purpose."""


class ModelNotFound(HybridError):
    """The model's name or folder is unknown on this machine and cannot be downloaded."""


class DownloadFailed(HybridError):
    """A model's file could not be downloaded, or does not match its checksum."""


class InvalidCheckpoint(HybridError):
    """A model's files are broken, incomplete or contradict each other."""


class InvalidArtifact(HybridError):
    """A profile, trace, predictor, plan or packed model is broken, or is for another model."""


class UnsupportedModel(HybridError):
    """The model is sound, but this engine does not run it."""


class UnsupportedIsa(HybridError):
    """The instruction set is unknown, or this CPU or this build lacks it."""


class InvalidOption(HybridError, ValueError):
    """An option's value is out of range."""


class ContextOverflow(HybridError):
    """The prompt does not fit into the context."""

    def __init__(self, message: str, *, n_tokens: int = 0, n_context: int = 0) -> None:
        """`n_tokens` of a sequence exceed a context of `n_context`; 0 if it is not known."""
        super().__init__(message)
        self.n_tokens, self.n_context = n_tokens, n_context


class NumericOverflow(HybridError):
    """A number of the model exceeds the range of its format, or is not finite."""


class QueueFull(HybridError):
    """A batching loop has as many waiting requests as it takes."""


class OutOfMemory(HybridError):
    """The model or a context does not fit into this machine's memory."""


class DeviceUnavailable(HybridError):
    """A GPU was requested, but this machine has none that hybrid can use."""


class DeviceFailed(HybridError):
    """The GPU reported an error or did not answer; its memory can no longer be trusted."""


class MissingPackage(HybridError):
    """An optional package is needed for this operation, and is not installed."""


class EngineClosed(HybridError):
    """The engine or session was used after it was closed."""
