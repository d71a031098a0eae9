"""Models in formats of other programs: what a file or folder is, and what to do.

Only what cannot be read is examined here, to explain why. A model is never refused because there
are other files beside it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

from hybrid.checkpoint.json_file import read_object
from hybrid.errors import InvalidCheckpoint
from hybrid.files import open_file

_ORIGINAL = "get the original model, a folder with config.json and *.safetensors"
_UNQUANTISED = f"{_ORIGINAL}, and let hybrid quantise it (--quant)"
_CONVERT = "convert it with the script of transformers for its family, or get it converted"
_LORA = "a LoRA adapter"
# The first match counts, so the certain ones come first.
_KINDS: tuple[tuple[str, str, str], ...] = (  # pattern of a file's name, what it is, what to do
    (r"adapter_(config\.json|model\..+)", _LORA, ""),
    (r".+\.gguf", "a GGUF model", "name the file itself"),
    (r".+\.llamafile", "a llamafile", _ORIGINAL),
    (r"quantize_config\.json|gptq_model.*", "a model quantised by GPTQ", _UNQUANTISED),
    (r"quant_config\.json", "a model quantised by AWQ", _UNQUANTISED),
    (r".+\.onnx(_data)?|onnx", "an ONNX model", _ORIGINAL),
    (r"openvino_.+\.(xml|bin)", "an OpenVINO model", _ORIGINAL),
    (r"mlc-chat-config\.json|ndarray-cache\.json", "an MLC model", _ORIGINAL),
    (r"model_index\.json", "a pipeline of diffusers, which makes no text", "choose another model"),
    (r"consolidated.*\.(pth|safetensors)", "a model in its authors' own format", _CONVERT),
    (
        r"(?!optimizer|scheduler|scaler|rng_state).+\.(pt|pth|ckpt)",
        "a checkpoint of torch",
        _CONVERT,
    ),
    (r".+\.nemo", "a NeMo model", _CONVERT),
    (r"tf_model\.h5|.+\.tflite", "a TensorFlow model", _ORIGINAL),
    (r"flax_model.*\.msgpack", "a Flax model", _ORIGINAL),
    (r".+\.(mlmodel|mlpackage|mlmodelc)", "a Core ML model", _ORIGINAL),
)
# llama.cpp's files before 2023.
_MAGICS = dict.fromkeys((b"tjgg", b"lmgg", b"fmgg", b"algg"), "a file of an early llama.cpp")
# What replaces a matrix `name.weight` in weights that another tool quantised.
_QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight.absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "trellis": "EXL3",
    "q_weight": "EXL2",
    "scales": "MLX",
}
_MAX_ADAPTER_BYTES = 1 << 20


def folder_kind(folder: Path, names: Collection[str]) -> str | None:
    """Return what a folder with these files is, and what to do; None if nothing tells."""
    for pattern, what, advice in _KINDS:
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return f"it is {what}; {advice or _merge_advice(folder / 'adapter_config.json')}"
    return None


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, llama.cpp's or PowerInfer's, or a link to one."""
    if not path.is_file():
        return False
    try:
        with open_file(path) as file:
            return file.read(4) in (b"GGUF", b"PWRI")
    except OSError:
        return False


def file_kind(path: Path) -> str | None:
    """Return what a file is that was named in place of a folder, and what to do."""
    if not path.is_file():
        return None
    try:
        with open_file(path) as file:
            kind = _MAGICS.get(file.read(4))
    except OSError:
        kind = None
    if kind:
        return f"it is {kind}; {_ORIGINAL}"
    name = path.name
    if name == "config.json" or name.endswith((".safetensors", ".bin")):
        return "name the folder that it is in"
    if name.lower().endswith(".gguf"):
        return "it does not begin as GGUF files do, or cannot be read; download it again"
    return folder_kind(path.parent, [name])


def quantised_by(missing: str, stored: Collection[str]) -> str | None:
    """Return the tool that quantised the weights, if it replaced the missing tensor."""
    matrix = missing.removesuffix("weight")
    stored = set(stored)
    return next((tool for end, tool in _QUANTISED.items() if matrix + end in stored), None)


def _merge_advice(path: Path) -> str:
    base = None
    with contextlib.suppress(InvalidCheckpoint):  # it only improves a message
        base = read_object(path, _MAX_ADAPTER_BYTES, keeps_constants=True).get(
            "base_model_name_or_path"
        )
    into = f"{base!r:.100}" if isinstance(base, str) else "its base model"
    return f"merge it into {into} with peft (merge_and_unload) and save the result as a folder"
