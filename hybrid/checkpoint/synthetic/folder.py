"""Synthetic models: the exact shape of a real model, with random weights and calibrated sparsity.

They serve to measure speed on machines that lack the real weights. Their text is noise.

This file owns the list of them and their folders. A folder has config.json and tokenizer.json like
a published model, and synthetic.json in place of weights. It gets the gate biases of a format when
that format is first used. `weights` makes the weights, and `calibration` finds the biases.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from hybrid.checkpoint.hf import Checkpoint, read_config
from hybrid.checkpoint.identity import ModelIdentity, SourceFile
from hybrid.checkpoint.json_file import read_object
from hybrid.checkpoint.synthetic.calibration import (
    CALIBRATION_SHAPE,
    HELD_OUT_SHAPE,
    Calibration,
    calibrate,
)
from hybrid.checkpoint.synthetic.weights import RECIPE, SyntheticWeights
from hybrid.checkpoint.tensor import Tensor
from hybrid.errors import InvalidCheckpoint, ModelNotFound
from hybrid.files import read_bytes, read_safetensors, replacing, write_atomically
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors
from hybrid.progress import Progress, ignore_progress
from predictors.schema import parse_json

PREFIX = "synthetic:"
_SEED = 1
_MARKER, _TOKENIZER = "synthetic.json", "tokenizer.json"
_METADATA = "calibration"  # key in a bias file's header: the model, the format and the result

_MINICPM_S_1B: dict[str, Any] = {  # as openbmb/MiniCPM-S-1B-sft has them
    "architectures": ["MiniCPMForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.03,
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "max_position_embeddings": 4096,
    "num_attention_heads": 24,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 73440,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "MiniCPM-S-1B": _MINICPM_S_1B,
    "tiny": _MINICPM_S_1B  # for tests: calibrated within a second
    | {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
_SAMPLING = {
    "do_sample": True,
    "top_p": 0.8,
    "temperature": 0.8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def synthetic_names() -> list[str]:
    return [PREFIX + name for name in _SHAPES]


def make_synthetic(model: str, home: Path) -> Path:
    """Return the folder in `home` of a name such as "synthetic:MiniCPM-S-1B". Makes it if missing.

    The name may be in upper or lower case. Raises ModelNotFound for an unknown name, or if the
    folder cannot be written.
    """
    wanted = model[len(PREFIX) :].casefold()
    name = next((name for name in _SHAPES if name.casefold() == wanted), None)
    if name is None:
        raise ModelNotFound(
            f"no synthetic model {model!r}; there are: {', '.join(synthetic_names())}"
        )
    folder = home / "synthetic" / f"{name}-v{RECIPE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in _contents(name).items():
            path = folder / file_name
            # Another marker or config is refused when the folder is opened. The tokenizer of an
            # earlier version would give other tokens.
            is_current = _holds(path, content) if file_name == _TOKENIZER else path.is_file()
            if not is_current:
                write_atomically(path, content)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _contents(name: str) -> dict[str, bytes]:
    """Return the content of each file of a synthetic model."""
    config = _SHAPES[name]
    files = {
        "config.json": config,
        "generation_config.json": _SAMPLING,
        _MARKER: {"recipe": RECIPE, "name": name, "seed": _SEED},
    }
    contents = {file: json.dumps(content, indent=1).encode() for file, content in files.items()}
    # On one line, which is written ten times as fast.
    tokenizer = json.dumps(_tokenizer(config["vocab_size"]), ensure_ascii=False)
    return contents | {_TOKENIZER: tokenizer.encode()}


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, len(content)) == content
    except OSError:
        return False


def is_synthetic(folder: Path) -> bool:
    """Return whether a folder holds a synthetic model."""
    try:
        return (folder / _MARKER).is_file()
    except OSError:  # no permission to look: opening the folder will report it
        return False


def open_synthetic(
    folder: Path, format: Format | None = None, progress: Progress = ignore_progress
) -> Checkpoint:
    """Open a synthetic model for a format. Calibrates it first if necessary.

    None means bf16, and f16 uses the biases of bf16: both hold these weights almost exactly.
    A bias file that is broken or of another recipe is made again, with the same biases. Raises
    InvalidCheckpoint if another file of the folder is broken, and ModelNotFound if the folder
    cannot be written.
    """
    config = read_config(folder)
    path = folder / _MARKER
    match read_object(path):
        case {"recipe": int(recipe), "name": str(name), "seed": int(seed)} if (
            recipe == RECIPE and seed >= 0
        ):
            weights = SyntheticWeights(config, seed)
        case content:
            raise InvalidCheckpoint(
                f"{path}: expected recipe {RECIPE}, a name and a seed, found {content!s:.100}; "
                "remove the folder: it is made again when the model is loaded by name"
            )
    packed = format
    if format in (None, Format.f16):
        format = Format.bf16
    bias_path = folder / f"gate_bias.{format.name}.safetensors"
    identity = {"recipe": RECIPE, "seed": seed, "format": format.name}
    calibration = _read_bias(bias_path, identity, config)
    if calibration is None:
        task = f"calibrating {PREFIX}{name} for {format.name}"
        try:
            with replacing(bias_path) as file:  # opened first, to fail before a minute of work
                calibration = calibrate(weights, format, progress, task)
                file.write(_bias_file(calibration, identity))
        except OSError as error:
            raise _not_writable(folder, error) from error
    notice = (
        f"{PREFIX}{name} has random weights: its text is noise, only its speed is real; "
        f"{calibration.active_fraction:.1%} of its neurons are active on held-out tokens "
        f"({format.name}, recipe {RECIPE})"
    )
    tensors = {
        (role, layer): _Generated(weights, role, layer, calibration.gate_bias)
        for role, layer, _, _ in expected_tensors(config)
    }
    return Checkpoint(
        folder,
        config,
        tensors,
        identity=ModelIdentity(folder, config, (SourceFile.of(path), SourceFile.of(bias_path))),
        format=packed,
        is_synthetic=True,
        notices=(notice,),
    )


@dataclass(frozen=True, slots=True)
class _Generated:
    """A tensor that is in no file and is made each time it is read."""

    weights: SyntheticWeights
    role: str
    layer: int | None
    gate_bias: np.ndarray  # (n_layers, n_neurons)

    def make(self) -> Tensor:
        bias = self.gate_bias[self.layer] if self.role == "gate" else None
        return Tensor(self.role, "F32", self.weights.make(self.role, self.layer, bias))


def _bias_file(calibration: Calibration, identity: dict[str, Any]) -> bytes:
    metadata = identity | {
        "calibration_tokens": math.prod(CALIBRATION_SHAPE),
        "held_out_tokens": math.prod(HELD_OUT_SHAPE),
        "active_fraction": calibration.active_fraction,
    }
    # One metadata entry only, because safetensors writes several in a random order.
    return save({"gate_bias": calibration.gate_bias}, {_METADATA: json.dumps(metadata)})


def _read_bias(path: Path, identity: dict[str, Any], config: ModelConfig) -> Calibration | None:
    """Read a bias file. Returns None if it is missing, broken or of another identity."""
    try:
        header, arrays = read_safetensors(path, 1 << 30)
        metadata, bias = parse_json(header[_METADATA]), arrays["gate_bias"]
        is_ours = {key: metadata[key] for key in identity} == identity
        active_fraction = float(metadata["active_fraction"])
    except (OSError, LookupError, ValueError, TypeError, OverflowError):
        return None
    is_sound = (
        bias.dtype == np.float32
        and bias.shape == (config.n_layers, config.n_neurons)
        and np.isfinite(bias).all()
    )
    return Calibration(bias, active_fraction) if is_ours and is_sound else None


def _not_writable(folder: Path, error: OSError) -> ModelNotFound:
    return ModelNotFound(
        f"cannot make the synthetic model in {folder}: {error}. Make room or grant access there, "
        "or set HYBRID_HOME to another folder."
    )


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """Make a tokenizer.json that encodes text byte by byte and decodes further ids as "w123"."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [f"▁w{token}" for token in range(len(pieces), vocab_size)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    no_flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": piece, **no_flags, "special": True}
            for token, piece in enumerate(special)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, *({"Sequence": {"id": text, "type_id": 0}} for text in "AB")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": True,  # a model without merges means it
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": [],
        },
    }
