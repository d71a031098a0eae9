"""Saved and copied sessions continue with the same bits; other files are refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from predictor_files import write_predictor
from safetensors import safe_open
from tiny_models import write_chat_model, write_model

import hybrid
from hybrid import ContextOverflow, Engine, EngineClosed, InvalidArtifact, InvalidOption, kernels
from hybrid.engine import session_file

IDS = np.random.default_rng(3).integers(0, 320, 400).tolist()
# Positions in a first span, at its end, behind it, at a tile of keys.
LENGTHS = [0, 1, 64, 100, 255, 256, 257, 400]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", vocab_size=4096)


def logits_after(session: hybrid.Session, token: int = 7) -> np.ndarray:
    session.decode(token)
    return session.logits.copy()


def saved(engine: Engine, path: Path, n: int = 20) -> Path:
    with engine.open_session() as session:
        session.prefill(IDS[:n])
        session.save(path)
    return path


def refused(engine: Engine, path: Path) -> str:
    with pytest.raises(InvalidArtifact) as raised:
        engine.open_session(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# Copies


@pytest.mark.parametrize("kv", ["fp16", "bf16"])
def test_a_copied_prefix_continues_with_the_same_bits(model, kv):
    with hybrid.load(model, kv=kv) as engine, engine.open_session() as source:
        source.prefill(IDS)
        with engine.open_session() as session:
            for n in LENGTHS:
                session.prefill(IDS[200:203])
                session.copy_prefix(source, n)
                assert session.tokens == tuple(IDS[:n])
                actual = session.prefill(IDS[50:60], all_logits=True)
                with engine.open_session() as alone:
                    expected = alone.prefill(IDS[:n] + IDS[50:60], all_logits=True)[n:]
                np.testing.assert_array_equal(actual, expected)
                session.reset()
        assert source.tokens == tuple(IDS)


def test_a_copy_and_its_source_are_independent(model):
    with hybrid.load(model) as engine, engine.open_session() as source:
        source.prefill(IDS[:10])
        copy = engine.open_session()
        copy.copy_prefix(source, 10)
        expected = logits_after(source)
        source.reset()
        source.prefill(IDS[20:60])
        np.testing.assert_array_equal(logits_after(copy), expected)
        source.copy_prefix(source, 3)
        assert source.tokens == tuple(IDS[20:23])


def test_a_copy_ends_the_generation_that_uses_the_session(model):
    with hybrid.load("stories") as engine, engine.open_session() as source:
        source.prefill([5, 6, 7])
        session = engine.open_session()
        generation = engine.generate("Once", session=session, max_tokens=50, seed=1)
        next(generation)
        session.copy_prefix(source, 2)
        assert "".join(generation) == ""
        assert generation.finish_reason == "cancelled"
        assert session.tokens == (5, 6)


def test_what_cannot_be_copied_is_refused(model, tmp_path):
    with hybrid.load(model) as engine, hybrid.load(model) as other:
        source, session = engine.open_session(), engine.open_session()
        source.prefill(IDS[:5])
        session.prefill(IDS[:2])
        for n in (-1, 6):
            with pytest.raises(InvalidOption, match=f"n: expected 0 to 5 tokens, found {n}"):
                session.copy_prefix(source, n)
        with pytest.raises(InvalidOption, match="another engine"):
            other.open_session().copy_prefix(source, 1)
        assert session.tokens == tuple(IDS[:2])
        source.close()
        for first, second in ((session, source), (source, session)):
            with pytest.raises(EngineClosed):
                first.copy_prefix(second, 1)
        predictor = write_predictor(tmp_path / "p", engine, margin=-1e7)
    with hybrid.load(model, predictor=predictor) as engine:
        dense = engine.open_session(dense=True)
        dense.prefill(IDS[:5])
        with pytest.raises(InvalidOption, match="computes otherwise"):
            engine.open_session().copy_prefix(dense, 1)


def test_the_native_session_refuses_what_is_not_its_own(model):
    with hybrid.load(model) as engine, hybrid.load(model) as other:
        session, source = engine._open().open_session(), engine._open().open_session()
        source.prefill(np.array(IDS[:5]))
        with pytest.raises(ValueError, match="one program"):
            session.copy_prefix(other._open().open_session(), 0)
        with pytest.raises(ValueError, match="one program, and one format"):
            session.copy_prefix(engine._open().open_session(kv=kernels.KvFormat.bf16), 0)
        for n in (-1, 6):
            with pytest.raises(ValueError, match="beyond the source's position"):
                session.copy_prefix(source, n)
        for first, last in ((-1, 2), (3, 2), (0, 6)):
            with pytest.raises(ValueError, match="in order"):
                source.read_kv(first, last)
        for shape in ((), (5,), (1, 2, 2, 2, 15), (1, 2, 2, 1, 16), (2, 2, 2, 2, 16, 1)):
            with pytest.raises(ValueError, match="must be"):
                session.append_kv(np.zeros(shape, np.uint16))
        with pytest.raises(ValueError, match="full"):
            session.append_kv(np.zeros((601, 2, 2, 2, 16), np.uint16))
        with pytest.raises(TypeError):
            session.append_kv(np.zeros((1, 2, 2, 2, 16), np.float32))
        assert session.position == 0


# Files


@pytest.mark.parametrize("kv", ["fp16", "bf16"])
def test_a_saved_session_continues_with_the_same_bits(model, tmp_path, isa, kv):
    files = []
    for threads in (1, 2):
        with hybrid.load(model, kv=kv, threads=threads) as engine:
            for n in LENGTHS:
                with engine.open_session() as session:
                    session.prefill([*IDS[:n], 1, 2, 3])
                    session.truncate(n)
                    session.save(tmp_path / "session")
                    files.append((tmp_path / "session").read_bytes())
                    expected = logits_after(session)
                with engine.open_session(tmp_path / "session") as session:
                    assert session.tokens == tuple(IDS[:n])
                    assert not session.logits.any()
                    np.testing.assert_array_equal(logits_after(session), expected)
    # Bytes depend on tokens alone: not on threads, nor on what the session has forgotten.
    assert files[: len(LENGTHS)] == files[len(LENGTHS) :]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}])
def test_text_from_a_loaded_session_equals_text_without_it(tmp_path, options):
    prompt = "Once upon a time there was a little dog"
    for threads in (1, 2):
        with hybrid.load("stories", threads=threads) as engine:
            expected = "".join(engine.generate(prompt, max_tokens=60, **options))
            with engine.open_session() as session:
                "".join(engine.generate(prompt, session=session, max_tokens=9, **options))
                session.save(tmp_path / "session")
                n = session.position
        with hybrid.load("stories", threads=3 - threads) as engine:
            session = engine.open_session(tmp_path / "session")
            assert session.position == n
            generation = engine.generate(prompt, session=session, max_tokens=60, **options)
            assert "".join(generation) == expected
            assert generation.stats.cached_tokens == generation.stats.prompt_tokens - 1


def test_a_conversation_finds_its_tokens_in_a_loaded_session(tmp_path):
    with hybrid.load(write_chat_model(tmp_path / "chat"), quant="bf16") as engine:
        messages = [{"role": "user", "content": "hello there"}]
        with engine.open_session() as session:
            "".join(engine.chat(messages, session=session, max_tokens=4, temperature=0))
            session.save(tmp_path / "session")
        expected = "".join(engine.chat(messages, max_tokens=9, temperature=0))
        session = engine.open_session(tmp_path / "session")
        answer = engine.chat(messages, session=session, max_tokens=9, temperature=0)
        assert "".join(answer) == expected
        assert answer.stats.cached_tokens == answer.stats.prompt_tokens - 1


def test_other_programs_can_read_the_file(model, tmp_path):
    for kv, dtype in (("fp16", "F16"), ("bf16", "BF16")):
        with hybrid.load(model, kv=kv) as engine:
            path = saved(engine, tmp_path / "session.safetensors")
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["hybrid_session"])
                assert about["model_hash"] == engine.model_hash
                assert (about["version"], about["n_tokens"], about["kv"]) == (
                    session_file.VERSION,
                    20,
                    kv,
                )
                assert file.get_tensor("tokens").tolist() == IDS[:20]
                part = file.get_slice("kv")
                assert (part.get_dtype(), part.get_shape()) == (dtype, [20, 2, 2, 2, 16])


def test_saving_replaces_a_file_or_leaves_it_alone(model, tmp_path):
    with hybrid.load(model) as engine:
        path = saved(engine, tmp_path / "session")
        before = path.read_bytes()
        saved(engine, path, 30)
        assert engine.open_session(str(path)).position == 30
        with engine.open_session() as session, pytest.raises(OSError, match="No such file"):
            session.save(tmp_path / "none" / "session")
        with pytest.raises(EngineClosed):
            session.save(path)
        assert len(path.read_bytes()) > len(before)
        assert list(tmp_path.iterdir()) == [path]


def test_a_context_that_is_too_small_is_refused_with_both_numbers(model, tmp_path):
    with hybrid.load(model) as engine:
        path = saved(engine, tmp_path / "session")
    with (
        hybrid.load(model, context_size=19) as engine,
        pytest.raises(ContextOverflow, match=r"holds 20 tokens.* holds 19.*context_size"),
    ):
        engine.open_session(path)
    with hybrid.load(model, context_size=20) as engine:
        session = engine.open_session(path)
        assert session.position == session.n_context == 20


def test_a_session_that_was_computed_otherwise_is_refused(model, tmp_path):
    with hybrid.load(model, quant="q8") as engine:
        path = saved(engine, tmp_path / "session")
        predictor = write_predictor(tmp_path / "predictor", engine)
    with hybrid.load(model, quant="q4") as engine:
        assert "another weight format: q8, this engine has q4; load" in refused(engine, path)
    with hybrid.load(model, quant="q8", kv="bf16") as engine:
        assert "KV cache: fp16, this engine has bf16; load" in refused(engine, path)
    with hybrid.load(write_model(tmp_path / "other", vocab_size=4096, seed=1)) as engine:
        assert "another model: " in refused(engine, path)
    with hybrid.load("stories") as engine:
        assert "another model: " in refused(engine, path)
    with hybrid.load(model, quant="q8", predictor=predictor) as engine:
        assert "another predictor: exact, this" in refused(engine, path)
        assert engine.open_session(path, dense=True).position == 20
    with kernels.using_isa("scalar"), hybrid.load(model, quant="q8") as engine:
        assert re.search("set HYBRID_ISA=.* if this CPU has it", refused(engine, path))


def test_predictors_are_told_from_one_another_by_their_content(model, tmp_path):
    path, files = tmp_path / "session", [tmp_path / "a", tmp_path / "b"]
    with hybrid.load(model) as engine:
        for file, margin in zip(files, (0.0, 0.5), strict=True):
            write_predictor(file, engine, margin=margin)
    with hybrid.load(model, predictor=files[0]) as engine:
        saved(engine, path)
        session = engine.open_session(path)
        expected = logits_after(session)
    with hybrid.load(model, predictor=files[1]) as engine:
        assert "another predictor: " in refused(engine, path)
    files[0].rename(tmp_path / "renamed")
    with hybrid.load(model, predictor=tmp_path / "renamed") as engine:
        np.testing.assert_array_equal(logits_after(engine.open_session(path)), expected)
        session = engine.open_session()
        (tmp_path / "renamed").unlink()
        with pytest.raises(InvalidArtifact, match="changed or removed after it was read"):
            session.save(path)


# Damage


@pytest.fixture
def tiny(tmp_path):
    """An engine whose sessions make small files, and such a file."""
    folder = write_model(tmp_path / "model", vocab_size=4096, num_hidden_layers=1, head_dim=8)
    with hybrid.load(folder) as engine:
        yield engine, saved(engine, tmp_path / "session", 5)


def test_a_file_that_is_cut_off_anywhere_is_refused(tiny):
    engine, path = tiny
    whole = path.read_bytes()
    assert len(whole) < 2500
    for n in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:n])
        refused(engine, path)
    path.write_bytes(whole + b"\0")
    assert f"expected {len(whole):,} bytes, found {len(whole) + 1:,}" in refused(engine, path)
    path.write_bytes(whole)
    assert engine.open_session(path).position == 5


def test_a_flipped_bit_anywhere_is_found(tiny):
    engine, path = tiny
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with pytest.raises((InvalidArtifact, ContextOverflow)):
            engine.open_session(path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert "its checksum differs" in refused(engine, path)


def test_random_damage_ends_in_an_error_of_ours(tiny):
    engine, path = tiny
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole)
        first, n = int(rng.integers(len(whole))), int(rng.integers(1, 40))
        content[first : first + n] = rng.bytes(int(rng.integers(0, 40)))
        path.write_bytes(content)
        with pytest.raises((InvalidArtifact, ContextOverflow)):
            engine.open_session(path)


def with_metadata(whole: bytes, metadata: str) -> bytes:
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    header["__metadata__"]["hybrid_session"] = metadata
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + n :]


HOSTILE = ["", "null", "3", "[]", "{", '{"a": NaN}', "{}", "9" * 5000, "[" * 5000, "\ud800"]


def test_hostile_metadata_is_refused(tiny):
    engine, path = tiny
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    about = json.loads(json.loads(whole[8 : 8 + n])["__metadata__"]["hybrid_session"])
    changes = [{name: value} for name in about for value in (None, -1, 10**400, "x" * 300, [], 2.5)]
    for change in changes:
        path.write_bytes(with_metadata(whole, json.dumps(about | change)))
        refused(engine, path)
    for text in HOSTILE:
        path.write_bytes(with_metadata(whole, text))
        refused(engine, path)
    header, n_bytes = session_file._header(about | {"n_tokens": 2**31})
    path.write_bytes(header)
    assert f"expected {n_bytes:,} bytes, found {len(header):,}" in refused(engine, path)
    path.write_bytes(
        with_metadata(whole, json.dumps(about | {"version": session_file.VERSION + 1}))
    )
    assert "expected a session of version 1, found 2" in refused(engine, path)
    path.write_bytes(with_metadata(whole, json.dumps(about | {"quant": "\x1b[31m\n"})))
    assert "\x1b" not in refused(engine, path)


def test_other_files_are_refused(tiny, tmp_path):
    engine, path = tiny
    model = engine.folder / "model.safetensors"
    path.write_bytes(model.read_bytes())
    assert "is not a session that hybrid saved" in refused(engine, path)
    path.write_bytes(b"\xff" * 5000)
    assert "is not a session that hybrid saved" in refused(engine, path)
    path.write_text("Once upon a time")
    assert "is not a session that hybrid saved" in refused(engine, path)
    assert "No such file" in refused(engine, tmp_path / "missing")
    assert "directory" in refused(engine, tmp_path).lower()


def test_tokens_beyond_the_vocabulary_are_refused(tiny):
    engine, path = tiny
    whole = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(whole[:8], "little")
    for token in (4096, -1):
        whole[first : first + 4] = token.to_bytes(4, "little", signed=True)
        path.write_bytes(whole)
        assert "tokens that the model does not have" in refused(engine, path)


def test_a_refused_file_leaves_no_session_open(tiny, monkeypatch):
    engine, path = tiny
    closed = []
    monkeypatch.setattr(hybrid.Session, "close", lambda session: closed.append(session))
    path.write_bytes(path.read_bytes()[:-1])
    refused(engine, path)
    assert len(closed) == 1


def test_a_model_that_changed_after_it_was_loaded_cannot_save(tmp_path):
    folder = write_model(tmp_path / "model", vocab_size=4096)
    with hybrid.load(folder) as engine, engine.open_session() as session:
        session.prefill([1, 2, 3])
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        with pytest.raises(hybrid.InvalidCheckpoint):
            session.save(tmp_path / "session")
    assert not (tmp_path / "session").exists()
