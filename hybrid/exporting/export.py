"""`export_model` writes a model in another engine's format: open, choose, describe, write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.checkpoint.synthetic.folder import is_synthetic
from hybrid.engine.loading.model_spec import hashes_folder
from hybrid.engine.options import LoadOptions
from hybrid.errors import InvalidOption
from hybrid.exporting.encoding import TYPES
from hybrid.exporting.gguf_file import LLAMA_CPP, POWERINFER, FileTensor, write_gguf
from hybrid.exporting.gguf_model import gguf_tensors, metadata
from hybrid.exporting.hf_folder import folder_files, write_folder
from hybrid.exporting.powerinfer import THRESHOLD_KEY, predictors
from hybrid.exporting.tensors import Written, model_tensors, written
from hybrid.exporting.writing import Meter, check_target
from hybrid.hub.catalog import hybrid_home
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices, short_list
from hybrid.progress import Progress, ignore_progress

Target = Literal["hf", "gguf", "powerinfer"]
TARGETS: tuple[str, ...] = get_args(Target)
_TYPES_OF: dict[str, tuple[str, ...]] = {  # the first one is the default
    "hf": ("bf16", "f32", "f16"),
    "gguf": ("f16", "bf16", "f32", "q8_0", "q4_0"),
    "powerinfer": ("f16", "q4_0"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A model that is to be written.

    `folder` is where its files are, and `model` what the user calls it. `options` are those of
    loading: the activation of a GGUF file, and for PowerInfer the predictor.
    """

    folder: Path
    model: str
    out: Path
    target: str
    type: str | None = None  # None: the target's default
    is_folded: bool = False  # write MiniCPM's scales into the weights of a Llama
    has_tokenizer: bool = True
    may_replace: bool = False
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    out: Path
    type: str
    n_bytes: int
    is_same_elsewhere: bool  # whether other engines of this format compute the same model
    notices: tuple[str, ...]  # one line each, for the user


def export_model(request: Request, progress: Progress = ignore_progress) -> Exported:
    """Write a model. If that fails, the target is what it was.

    Raises InvalidOption for what the target cannot be, OSError if it cannot be written, and the
    errors of opening a model.
    """
    kind, notices = _kind(request), Notices()
    if is_synthetic(request.folder):
        raise InvalidOption(
            f"{request.model}: is synthetic: its weights are made for each format when it is "
            "opened, so there is nothing to export"
        )
    options = request.options
    with open_checkpoint(
        request.folder,
        # A predictor belongs to weights in a format. Otherwise nothing is packed.
        options.format if request.target == "powerinfer" else None,
        hashes=hashes_folder(hybrid_home()),
        activation=options.activation,
    ) as checkpoint:
        _check(request, checkpoint)
        config = _config(request, checkpoint.config)
        notices.add(*checkpoint.notices)
        if request.target == "hf":
            _write_folder(request, checkpoint, config, kind, notices, progress)
        else:
            _write_gguf(request, checkpoint, config, kind, notices, progress)
    is_same = _is_same_elsewhere(config, request.target)
    return Exported(request.out, kind.name, _size(request.out), is_same, tuple(notices))


def _kind(request: Request) -> BlockType:
    known = _TYPES_OF[request.target]
    name = known[0] if request.type is None else request.type.lower()
    if name not in known:
        raise InvalidOption(
            f"--type {request.type}: {request.target} is written as {', '.join(known)}"
        )
    return TYPES[name]


def _check(request: Request, checkpoint: Checkpoint) -> None:
    sources = [checkpoint.identity.folder / file.name for file in checkpoint.identity.sources]
    check_target(
        request.out,
        [request.folder, *sources],
        is_folder=request.target == "hf",
        may_replace=request.may_replace,
    )


def _config(request: Request, config: ModelConfig) -> ModelConfig:
    """Return what the written files describe."""
    if request.target == "powerinfer":
        config = replace(config, has_tied_head=False)
    if config.family == "minicpm" and (request.is_folded or request.target == "powerinfer"):
        return replace(
            config,
            family="llama",
            has_tied_head=config.has_tied_head and config.embedding_scale == config.logit_scale,
            embedding_scale=1.0,
            residual_scale=1.0,
            logit_scale=1.0,
        )
    return config


def _write_folder(
    request: Request,
    checkpoint: Checkpoint,
    config: ModelConfig,
    kind: BlockType,
    notices: Notices,
    progress: Progress,
) -> None:
    tensors = [written(name, kind, source) for name, source in model_tensors(checkpoint, config)]
    # A file has one type, norms too, as torch saves a model.
    tensors = [replace(tensor, type=kind) for tensor in tensors]
    files = folder_files(checkpoint, config, kind.name, has_tokenizer=request.has_tokenizer)
    notices.add(*_about_types(tensors, kind))
    if config.activation == "fatrelu":
        notices.add("transformers does not know the activation fatrelu; hybrid reads the folder")
    if config.family == "minicpm":
        notices.add(
            "transformers runs MiniCPM with the code of its authors only; --fold writes a Llama"
        )
    write_folder(request.out, files, tensors, _meter(kind, tensors, progress))


def _write_gguf(
    request: Request,
    checkpoint: Checkpoint,
    config: ModelConfig,
    kind: BlockType,
    notices: Notices,
    progress: Progress,
) -> None:
    is_powerinfers = request.target == "powerinfer"
    keys = metadata(checkpoint, config, kind, notices, has_tokenizer=request.has_tokenizer)
    weights = list(gguf_tensors(checkpoint, config, kind, is_powerinfers=is_powerinfers))
    tensors: list[FileTensor] = [*weights]
    if is_powerinfers:
        tensors += predictors(checkpoint, request.model, request.options, notices, progress)
        keys[THRESHOLD_KEY] = 0.0
    notices.add(*_about_types(weights, kind), *_about_activation(config, request.target))
    magic = POWERINFER if is_powerinfers else LLAMA_CPP
    write_gguf(request.out, magic, keys, tensors, _meter(kind, tensors, progress))


def _about_types(tensors: Sequence[Written], kind: BlockType) -> Iterator[str]:
    """Yield what a user should know about the types of tensors."""
    matrices = [tensor for tensor in tensors if len(tensor.source.shape) == 2]
    if others := [tensor.name for tensor in matrices if tensor.type != kind]:
        yield (
            f"written as F16, because their rows are no multiple of {kind.n_values} values: "
            f"{short_list(others)}"
        )
    rounded = {tensor.source.stored_type for tensor in tensors if tensor.is_rounded}
    if rounded:
        yield f"weights that are stored as {', '.join(sorted(rounded))} are rounded to {kind.name}"


def _about_activation(config: ModelConfig, target: str) -> Iterator[str]:
    """Yield in what other engines compute another function than the model's."""
    shown = f"{config.activation}" + (f" {config.threshold:g}" if config.threshold else "")
    if target == "gguf" and config.is_sparse:
        yield (
            f"this model needs {shown}; GGUF cannot say so, and llama.cpp and others compute SiLU "
            "and write nonsense; hybrid reads the key hybrid.activation"
        )
    if target == "powerinfer" and config.activation == "fatrelu":
        yield (
            f"this model needs {shown}; PowerInfer computes plain ReLU, as for the variants of "
            "such models in llama format"
        )


def _is_same_elsewhere(config: ModelConfig, target: str) -> bool:
    """Return whether the format's own engine knows the activation and the scales."""
    if target == "hf":
        return config.family == "llama" and config.activation != "fatrelu"
    return config.activation == ("silu" if target == "gguf" else "relu")


def _meter(kind: BlockType, tensors: Sequence[FileTensor], progress: Progress) -> Meter:
    total = sum(tensor.n_bytes for tensor in tensors)
    return Meter(f"writing {kind.name}", total, progress)


def _size(out: Path) -> int:
    files = out.rglob("*") if out.is_dir() else [out]
    return sum(path.stat().st_size for path in files if path.is_file())
