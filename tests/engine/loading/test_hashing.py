"""A model is hashed only if something needs its hash, and then once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from placement.test_profile import random_profile
from predictor_files import write_predictor
from tiny_models import write_model

import hybrid
from hybrid.checkpoint import identity
from hybrid.engine.engine import Engine
from hybrid.engine.loading.pipeline import Request, load_parts
from hybrid.engine.loading.prediction import predictor_path
from hybrid.engine.options import LoadOptions
from hybrid.placement.profile import FILE_NAME
from hybrid.weights import packed_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", vocab_size=4096)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the files that have been hashed."""
    sizes: list[int] = []
    hash_content = identity.hash_content

    def count(descriptor: int, n_bytes: int, stops: object) -> str:
        sizes.append(n_bytes)
        return hash_content(descriptor, n_bytes, stops)

    monkeypatch.setattr(identity, "hash_content", count)
    monkeypatch.setattr(identity, "SETTLED_NS", -1)
    return sizes


def load(model: Path, home: Path | None, **options: object) -> Engine:
    return Engine(load_parts(Request(model, LoadOptions(**options), home)))


@pytest.mark.parametrize("has_home", [False, True])
def test_a_model_that_nothing_names_is_not_hashed(model, tmp_path, hashed, has_home):
    with load(model, tmp_path / "home" if has_home else None, predictor="auto") as engine:
        "".join(engine.generate([5, 6], max_tokens=2))
        assert hashed == []
        assert engine.plan.model_hash == engine.model_hash  # now something needs it
        assert hashed == [(model / "model.safetensors").stat().st_size]


def test_a_profile_or_predictor_that_could_be_the_models_needs_the_hash(model, tmp_path, hashed):
    home = tmp_path / "home"
    with load(model, None) as engine:
        profile, model_hash = random_profile(engine), engine.model_hash
        kept = predictor_path(home, model_hash, "q8")
        kept.parent.mkdir(parents=True)
        write_predictor(kept, engine)
    hashed.clear()
    with load(model, home, predictor="auto") as engine:
        assert engine.prediction is not None
    assert len(hashed) == 1
    profile.save(model / FILE_NAME)
    with load(model, home) as engine:
        assert engine.neuron_orders is not None
    assert len(hashed) == 1  # remembered


def test_a_packed_file_is_found_without_hashing_again(model, tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    home = tmp_path / "home"
    for _ in range(3):
        load(model, home).close()
    assert len(hashed) == 1
    os.utime(model / "model.safetensors")
    load(model, home).close()
    assert len(hashed) == 2
    assert len(list((home / "packed").iterdir())) == 1


def test_another_fine_tune_never_gets_this_models_predictor(model, tmp_path, monkeypatch):
    """The two files differ in one byte that samples of a file would hardly meet."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    with hybrid.load(model) as engine:
        kept = predictor_path(tmp_path / "home", engine.model_hash, "q8")
        kept.parent.mkdir(parents=True)
        write_predictor(kept, engine)
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction is not None
    path = model / "model.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction is None
    with pytest.raises(hybrid.InvalidArtifact, match="other weights"):
        hybrid.load(model, predictor=kept)
