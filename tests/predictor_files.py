"""Write predictor files for tests, without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hybrid import Engine, Session
from hybrid.weights.packing import order_hash
from predictors.file import Choice, PredictorFile
from predictors.predictors import LowRank, round_blocks


def about(engine: Engine, **changes: object) -> dict[str, object]:
    """Return a file's description of the engine's model, with `changes`."""
    config = engine.config
    return {
        "model": "tiny",
        "model_hash": engine.model_hash,
        "order_hash": order_hash(engine.neuron_orders),
        "quant": engine.quant,
        "input": "normed",
        "n_layers": config.n_layers,
        "n_neurons": config.n_neurons,
        "hidden_size": config.hidden_size,
        **changes,
    }


def trace_about(**changes: object) -> dict[str, object]:
    """Return what `TraceWriter.finish` needs to know of a model that does not exist."""
    names = ("model", "model_hash", "order_hash", "quant", "input", "activation")
    costs = {"exact_ns": 9.0, "named_row_ns": 1.0, "lowrank_ns": {"8": 2.0}}
    about = {**dict.fromkeys(names, "x"), "threshold": 0.5, "texts": [], "costs": costs}
    return about | changes


def choice(kind: str, rank: int = 0, margin: float = 0.0) -> Choice:
    """Return a Choice whose measured figures are made up."""
    return Choice(kind, rank, margin, 0.99, 0.995, 0.5, 0.25, 1.0, 2.0)


def random_lowrank(engine: Engine, rank: int, seed: int = 0) -> LowRank:
    config, rng = engine.config, np.random.default_rng(seed)
    return LowRank(
        round_blocks(rng.standard_normal((rank, config.hidden_size)).astype(np.float32)),
        rng.integers(-8, 8, (config.n_neurons, rank)).astype(np.int8),
        np.ones((config.n_neurons, 2), np.float32),
        np.zeros(config.n_neurons, np.float32),
    )


def write_predictor(
    path: Path,
    engine: Engine,
    *,
    kinds: tuple[str, ...] = ("lowrank", "lowrank"),
    margin: float = 0.0,
    **changes: object,
) -> Path:
    """Write a file for recall 0.99 with a random predictor of kind `kinds[layer]` per layer."""
    choices, predictors = [], {}
    for layer, kind in enumerate(kinds):
        rank = 12 if kind == "lowrank" else 0
        choices.append(choice(kind, rank, margin if kind != "exact" else 0.0))
        if kind == "lowrank":
            predictors[layer, f"lowrank{rank}"] = random_lowrank(engine, rank)
    PredictorFile({0.99: choices}, predictors, about(engine, **changes)).save(path)
    return path


def decode_counted(engine: Engine, ids: np.ndarray) -> Session:
    """Prefill `ids`, decode three tokens and return the session.

    Asserts that the bytes which the session counted equal those of the formula.
    """
    session = engine.open_session()
    session.prefill(ids)
    session.reset_counts()
    for token in (5, 6, 7):
        session.decode(token)
    assert sum(session.decode_bytes.values()) == engine.expected_decode_bytes(
        n_tokens=3,
        first_position=ids.size,
        n_active=sum(session.active_counts),
        n_gates=sum(session.predicted_counts),
        n_shortlisted=session.shortlisted_count,
    )
    return session
