"""Checks before anything is computed: the files, the contents of config.json, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybrid.checking.check import Check, Figures
from hybrid.engine.oracle.comparison import oracle_bytes
from hybrid.errors import UnsupportedIsa
from hybrid.hub import checksum
from hybrid.kernels import Format, active_isa, available_isas, check_isa_cap
from hybrid.limits import allowed_threads
from hybrid.model.config import ModelConfig
from hybrid.notices import short_list
from hybrid.placement.hardware import available_memory_bytes
from hybrid.weights.layout import packed_layout


def check_files(folder: Path) -> Check:
    """Hash every file with a known checksum, even if it was verified before: disks can fail."""
    known, wrong = 0, []
    for path in sorted(folder.iterdir()):
        etag = checksum.known_etag(path) if path.is_file() else None
        if etag is not None:
            known += 1
            if checksum.digest(path, etag) != etag:
                wrong.append(path)
    figures = {"checked": known, "wrong": len(wrong)}
    if wrong:
        message = f"The checksum is wrong: {', '.join(path.name for path in wrong)}."
        paths = " ".join(str(path.resolve()) for path in wrong)
        return Check("files", "failed", message, f"Remove {paths} and download again.", figures)
    if not known:
        message = f"{folder}: the files' checksums are not known, so none was checked."
        return Check("files", "ok", message, figures=figures)
    return Check("files", "ok", f"{known} files match their checksums.", figures=figures)


def check_architecture(config: ModelConfig) -> Check:
    activation = {"relu": "ReLU", "fatrelu": f"FATReLU, threshold {config.threshold:g}"}
    message = (
        f"{config.family}: {config.n_layers} layers of {config.hidden_size} with "
        f"{config.n_neurons} neurons, {config.n_heads} heads ({config.n_kv_heads} for keys and "
        f"values), {config.vocab_size} tokens; {activation.get(config.activation, 'SiLU')}; "
        f"scales: embedding {config.embedding_scale:g}, branches {config.residual_scale:.4g}, "
        f"logits {config.logit_scale:.4g}."
    )
    figures: Figures = {
        "activation": config.activation,
        "threshold": config.threshold,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_scale,
    }
    if config.family == "minicpm" and config.embedding_scale == 1.0:
        advice = (
            "MiniCPM's own config.json has scale_emb, scale_depth and dim_model_base: download it."
        )
        message += " The config has no scales."
        return Check("architecture", "warning", message, advice, figures)
    return Check("architecture", "ok", message, figures=figures)


def check_tensors(unused: Sequence[str]) -> Check:
    """Name the tensors of the files that are not used: the files may be of another model."""
    figures = {"unused": len(unused)}
    if unused:
        message = f"In the files, but not used: {short_list(unused, 12)}."
        advice = (
            "config.json may be of another model, or the model has parts that hybrid does not run: "
            "compare its text with that of transformers."
        )
        return Check("tensors", "warning", message, advice, figures)
    return Check("tensors", "ok", "All tensors of the files are used.", figures=figures)


def check_isa() -> Check:
    try:
        check_isa_cap()
    except UnsupportedIsa as error:
        return Check("instruction set", "failed", str(error), "Unset HYBRID_ISA.")
    best, active = available_isas()[-1], active_isa()
    figures: Figures = {"best": best, "active": active}
    if active != best:
        message = f"{active}, although the CPU has {best}: HYBRID_ISA caps it."
        return Check("instruction set", "warning", message, "Unset HYBRID_ISA.", figures)
    if "avx2" not in available_isas():
        message = (
            f"{active}: this CPU or this build lacks AVX2, so the portable kernels run, slowly."
        )
        advice = "If the CPU has AVX2, install hybrid again on this machine."
        return Check("instruction set", "warning", message, advice, figures)
    return Check("instruction set", "ok", f"{active}, the best that this CPU has.", figures=figures)


def check_memory(config: ModelConfig, format: Format) -> Check:
    weights, oracle = packed_layout(config, format).n_bytes, oracle_bytes(config)
    available = available_memory_bytes()
    message = (
        f"The weights in {format.name} need {weights / 1e9:.2f} GB, then the oracle needs "
        f"{oracle / 1e9:.2f} GB; {available / 1e9:.1f} GB are free."
    )
    figures: Figures = {
        "quant": format.name,
        "weight_bytes": weights,
        "oracle_bytes": oracle,
        "available_bytes": available,
    }
    if max(weights, oracle) > available:
        advice = "Close other programs or try --quant q4; else the system may swap or end hybrid."
        return Check("memory", "warning", message, advice, figures)
    return Check("memory", "ok", message, figures=figures)


def check_threads(n_threads: int) -> Check:
    cores = allowed_threads()
    message = f"{n_threads} for {cores} cores that this process may use."
    figures: Figures = {"threads": n_threads, "cores": cores}
    if n_threads > cores:
        advice = f"More threads than cores only wait for one another: use -t {cores}."
        return Check("threads", "warning", message, advice, figures)
    return Check("threads", "ok", message, figures=figures)
