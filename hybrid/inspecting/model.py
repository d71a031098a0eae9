"""Finds out what a model is, as far as its files can be read.

Loading stops at the first thing that it refuses. This goes on: each part is read by itself, and the
error of loading is one of the facts. Only headers are read, unless the caller wants all bytes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.gguf import is_gguf
from hybrid.checkpoint.gguf.activation import choose_activation
from hybrid.checkpoint.gguf.reader import GgufFile, read_gguf
from hybrid.checkpoint.gguf.weights import open_files
from hybrid.checkpoint.hf import open_weights, read_config
from hybrid.checkpoint.json_file import read_object
from hybrid.checkpoint.name import model_name
from hybrid.checkpoint.safetensors import SafetensorsFile
from hybrid.checkpoint.synthetic.folder import is_synthetic
from hybrid.engine.loading.choices import WORKING_BYTES
from hybrid.engine.loading.model_spec import hashes_folder
from hybrid.engine.options import checked_context
from hybrid.errors import HybridError, ModelNotFound
from hybrid.files import has_files
from hybrid.hub.catalog import CatalogEntry, catalog, resolve
from hybrid.inspecting.content import read_content
from hybrid.inspecting.predictors import stored_predictors, trained_predictors
from hybrid.inspecting.report import Activation, PredictorRanks, Report, Running, TokenizerFacts
from hybrid.inspecting.shapes import raw_config_shapes, raw_gguf_shapes, shapes_of
from hybrid.inspecting.stored import StoredTensor, folder_tensors, gguf_tensors, table
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors
from hybrid.notices import Notices
from hybrid.placement.hardware import available_memory_bytes
from hybrid.placement.profile import find_profile
from hybrid.progress import Progress, ignore_progress
from hybrid.text.generation_config import read_generation_defaults
from hybrid.text.tokenizer import Tokenizer
from hybrid.weights.formats import DEFAULT_FORMAT
from hybrid.weights.layout import packed_layout

_QUICK_BYTES = 256 << 20  # files that are hashed only to find what belongs to the model
_MOST_IDS = 1 << 20  # of a vocabulary, if the model's own number is not known
_NOT_SAID = "not known: GGUF files do not record it"


def inspect_model(
    model: str,
    *,
    home: Path | None,
    reads_all: bool = False,
    progress: Progress = ignore_progress,
) -> Report:
    """Return what is known about a model: a name of the catalog, a folder or a file.

    Nothing is downloaded. `home` is hybrid's own folder, in which profiles and predictors of the
    model are looked for. `reads_all` hashes each tensor and looks for values that are not finite.

    Raises ModelNotFound if there is no such model, and InvalidCheckpoint if no part can be read.
    """
    if (packed := _packed(model)) is not None:
        return packed
    notices = Notices()
    try:
        path = resolve(model, offline=True, notices=notices)
    except ModelNotFound as error:
        entry = _named(model)
        if entry is None:
            raise
        return _not_here(entry, error)
    report, tensors = _of_gguf(model, path) if is_gguf(path) else _of_folder(model, path)
    report = replace(report, path=str(path))
    report = _as_loaded(report, path, home, notices, hashes=reads_all)
    if reads_all:
        report = replace(report, content=read_content(tensors, progress))
    return report


def _named(model: str) -> CatalogEntry | None:
    return next((each for each in catalog() if each.name.casefold() == model.casefold()), None)


def _not_here(entry: CatalogEntry, error: ModelNotFound) -> Report:
    """Say what the catalog knows of a model that was not downloaded."""
    return Report(
        entry.name,
        f"of the catalog, not on this machine: {entry.description}",
        sparsity=_published(entry.name),
        refused=f"{error} `hybrid run -m {entry.name}` downloads it.",
    )


def _published(model: str, path: Path | None = None) -> dict[str, float]:
    """Return the sparsity that a model's authors published, if the catalog knows it."""
    for entry in catalog():
        names = {entry.name.casefold(), str(entry.repo_id).casefold()}
        is_copy = path is not None and model_name(path).casefold() in names
        if (is_copy or model.casefold() in names) and entry.expected_active_fraction is not None:
            return {"published": 1.0 - entry.expected_active_fraction}
    return {}


# GGUF files


def _of_gguf(model: str, path: Path) -> tuple[Report, list[StoredTensor]]:
    files, refused = _readable(path)
    first, tensors = files[0], gguf_tensors(files)
    parts = f" of {len(files)} files" if len(files) > 1 else ""
    predictors = stored_predictors(files)
    whose = "PowerInfer's " if first.is_powerinfers else ""
    if any("Kairox" in found.source for found in predictors):
        whose = "Kairox's "
    report = Report(
        model,
        f"{whose}GGUF version {first.version}{parts}",
        files=tuple((file.path.name, len(file.buffer)) for file in files),
        architecture=_text(first.metadata.get("general.architecture")),
        shapes=raw_gguf_shapes(first),
        parameters=sum(tensor.n_weights for tensor in tensors),
        types=table(tensors),
        activation=_gguf_activation(first),
        sparsity=_stored_threshold(first),
        predictors=predictors,
        refused=refused,
    )
    return report, tensors


def _readable(path: Path) -> tuple[list[GgufFile], str | None]:
    """Return the files of a model, or its first one and why the others cannot be read."""
    try:
        return open_files(path), None
    except HybridError as error:
        return [read_gguf(path)], str(error)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _gguf_activation(file: GgufFile) -> Activation:
    try:
        chosen = choose_activation(file, None)
    except HybridError:
        return Activation(None, None, _NOT_SAID)
    threshold = chosen.threshold if chosen.name == "fatrelu" else None
    source = chosen.source or "a guess: nothing says it; `hybrid selfcheck` finds out"
    return Activation(chosen.name, threshold, source)


def _stored_threshold(file: GgufFile) -> dict[str, float]:
    value = file.metadata.get("powerinfer.sparse_threshold")
    return {"powerinfer.sparse_threshold": value} if isinstance(value, float) else {}


# Folders


def _of_folder(model: str, folder: Path) -> tuple[Report, list[StoredTensor]]:
    report, refused = Report(model, "folder without weights"), None
    tensors: list[StoredTensor] = []
    if (folder / "config.json").exists():
        content = read_object(folder / "config.json")
        listed = content.get("architectures")
        architecture = _text(listed[0]) if isinstance(listed, list) and listed else None
        activation = Activation(_text(content.get("hidden_act")), None, "config.json")
        report = replace(
            report,
            architecture=architecture,
            shapes=raw_config_shapes(content),
            activation=activation,
        )
    if is_synthetic(folder):
        kind = "synthetic: random weights, made when it is loaded; its text is noise"
        return replace(report, kind=kind), tensors
    try:
        weights = open_weights(folder)
        tensors = folder_tensors(weights)
        paths = weights.paths
        suffix = "safetensors" if paths[-1].suffix == ".safetensors" else "PyTorch"
        kind = f"Hugging Face folder, {suffix} weights"
        files = tuple((path.name, path.stat().st_size) for path in paths)
        report = replace(report, kind=kind, files=files)
    except HybridError as error:
        if report.architecture is None:
            raise
        refused = str(error)
    if model.casefold() == "stories":
        report = replace(report, kind=f"bundled with hybrid: {report.kind}")
    n_weights = sum(tensor.n_weights for tensor in tensors)
    report = replace(report, parameters=n_weights or None, types=table(tensors), refused=refused)
    return report, tensors


# What loading finds


def _as_loaded(
    report: Report, path: Path, home: Path | None, notices: Notices, *, hashes: bool
) -> Report:
    """Add what depends on a config that hybrid understands, and how the model runs."""
    config, checkpoint, refused = _opened(path, home, notices)
    refused = report.refused or refused
    report = replace(report, sparsity=_published(report.model, path) | report.sparsity)
    if config is not None:
        report = _with_config(report, config)
    if checkpoint is not None and home is not None:
        identity = checkpoint.identity
        n_bytes = sum(source.n_bytes for source in identity.sources)
        if hashes or n_bytes <= _QUICK_BYTES or identity.is_hashed:
            report = _with_recorded(report, checkpoint, home)
    tokenizer, problem = _tokenizer(path, config, report, notices)
    refused = refused or problem
    report = replace(report, tokenizer=tokenizer, refused=refused, notices=tuple(notices))
    if refused is None and config is not None:
        format = DEFAULT_FORMAT if checkpoint is None else checkpoint.format or DEFAULT_FORMAT
        report = replace(report, running=_running(report, format.name, config))
    return report


def _opened(
    path: Path, home: Path | None, notices: Notices
) -> tuple[ModelConfig | None, Checkpoint | None, str | None]:
    """Return the config, the checkpoint if it can be opened, and the error if not."""
    try:
        if is_synthetic(path):  # opening it would take a minute
            return read_config(path), None, None
        checkpoint = open_checkpoint(path, "auto", hashes=hashes_folder(home))
        notices.add(*checkpoint.notices)
        return checkpoint.config, checkpoint, None
    except HybridError as error:
        refused = str(error)
    try:  # if only the activation is not known, the shapes are
        return open_checkpoint(path, activation="silu").config, None, refused
    except HybridError:
        return None, None, refused


def _with_config(report: Report, config: ModelConfig) -> Report:
    kv = 1000 * 2 * 2 * config.n_kv_heads * config.head_dim * config.n_layers
    activation = report.activation
    if activation is not None and activation.name is not None:
        threshold = config.threshold if config.activation == "fatrelu" else None
        activation = Activation(config.activation, threshold, activation.source)
    return replace(
        report,
        shapes=shapes_of(config),
        parameters=report.parameters or _n_parameters(config),
        activation=activation,
        packed_bytes={
            name: packed_layout(config, format).n_bytes
            for name, format in Format.__members__.items()
        },
        kv_bytes_per_1000_tokens=kv,
    )


def _n_parameters(config: ModelConfig) -> int:
    return sum(math.prod(tensor.shape) for tensor in expected_tensors(config))


def _with_recorded(report: Report, checkpoint: Checkpoint, home: Path) -> Report:
    """Add what hybrid measured and trained."""
    identity = checkpoint.identity
    profile = find_profile(checkpoint.folder, home, identity, checkpoint.config, Notices())
    sparsity = report.sparsity
    if profile is not None:
        sparsity = sparsity | {"measured": float(profile.sparsity.mean())}
    trained: Sequence[PredictorRanks] = ()
    if has_files(home / "predictors"):
        trained = trained_predictors(home, identity.weights_hash)
    return replace(report, sparsity=sparsity, predictors=(*report.predictors, *trained))


def _tokenizer(
    path: Path, config: ModelConfig | None, report: Report, notices: Notices
) -> tuple[TokenizerFacts | None, str | None]:
    size = int(report.shapes.get("vocabulary", 0)) or _MOST_IDS
    ends = () if config is None else config.eos_ids
    try:
        tokenizer = Tokenizer.from_folder(
            path,
            vocab_size=size,
            bos_id=None if config is None else config.bos_id,
            eos_id=next(iter(ends), None),
        )
        notices.add(*tokenizer.notices)
        notices.add(*read_generation_defaults(path, size).notices)
    except HybridError as error:
        return None, str(error)
    summary = tokenizer.summary
    facts = TokenizerFacts(
        summary.kind,
        summary.n_ids,
        summary.n_added,
        _spelled(tokenizer, tokenizer.bos),
        _spelled(tokenizer, ends),
        summary.own_templates,
        summary.template,
    )
    return facts, None


def _spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(tokenizer.token_text(id) or str(id) for id in ids)


def _running(report: Report, quant: str, config: ModelConfig) -> Running:
    context = checked_context(None, config)
    assert report.kv_bytes_per_1000_tokens is not None
    cache = report.kv_bytes_per_1000_tokens * context // 1000
    has_template = report.tokenizer is not None and report.tokenizer.template is not None
    command = f"hybrid run -m {shlex.quote(report.model)}" + " --chat" * has_template
    return Running(
        quant,
        context,
        report.packed_bytes[quant] + cache + WORKING_BYTES,
        available_memory_bytes(),
        command if has_template else f'{command} -p "Once upon a time"',
    )


# Files of hybrid's own


def _packed(model: str) -> Report | None:
    """Describe a packed model, if `model` is the file of one."""
    path = Path(model)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    file = SafetensorsFile(path)
    metadata = file.metadata
    if "hybrid_packed" not in metadata:
        return None
    kind = f"packed by hybrid to {metadata.get('format')}, version {metadata['hybrid_packed']}"
    return Report(
        model,
        kind,
        path=str(path),
        files=((path.name, path.stat().st_size),),
        refused=(
            "it is a copy that hybrid keeps of a model in the layout of its kernels, and is used "
            "when that model is loaded; name the model"
        ),
        notices=(f"of the model with the hash {metadata.get('source', ''):.16}",),
    )
