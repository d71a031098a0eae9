"""A recording counts the neurons that fire and traces their inputs. An interrupted recording ends
with the same result.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from predictor_files import decode_counted, trace_about
from slow import slow_except
from text.test_bos import template
from tiny_models import ODD_SHAPES, STORIES, change_json, write_model

import hybrid
from hybrid import HybridError, InvalidOption, load, setup
from hybrid.checkpoint import open_checkpoint
from hybrid.cli.command_line import load_options
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Format
from hybrid.notices import Notices
from hybrid.placement.profile import FILE_NAME, POSITION_BUCKETS, load_profile
from predictors.trace import TraceSizes, TraceWriter, load_trace
from predictors.train import Options, train
from profiler import recorder, sparsity
from profiler.corpus import TextFile, TokenLists
from profiler.record import main
from profiler.recorder import RecordingOptions, record
from profiler.statistics import ActivationSums, position_buckets

TEXT = Path(__file__).parents[1] / "data" / "held_out_story.txt"
OPTIONS = RecordingOptions(model="tiny", window=32)


def ignore(task: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def tokens():
    rng = np.random.default_rng(3)
    return [TokenLists(name, rng.integers(0, 4000, (3, 50)).tolist()) for name in ("one", "two")]


@pytest.fixture
def engine(tmp_path):
    with load(write_model(tmp_path / "model", vocab_size=4096, intermediate_size=203)) as engine:
        yield engine


def windows_of(corpora, window=32):
    for corpus in corpora:
        for ids in corpus.sequences:
            for first in range(0, len(ids), window):
                yield corpus.name, ids[first : first + window]


def unpacked(masks: np.ndarray, n_neurons: int) -> np.ndarray:
    return np.unpackbits(masks, axis=-1, bitorder="little")[..., :n_neurons].astype(bool)


def test_observed_masks_and_inputs_match_the_oracle(tmp_path):
    model = write_model(tmp_path / "m", vocab_size=4096, hidden_act="relu", hidden_act_param=None)
    ids = np.random.default_rng(5).integers(0, 4000, 100)  # more than one chunk
    with load(model, quant="bf16") as engine:
        session = engine.open_session()
        seen = session.observe(ids, inputs=True)
        plain = engine.open_session()
        plain.prefill(ids)
        np.testing.assert_array_equal(session.logits, plain.logits)
        masks = unpacked(seen.masks, engine.config.n_neurons)
        assert masks.sum((1, 2)).tolist() == session.active_counts
    with open_checkpoint(model) as checkpoint:
        weights = read_weights(checkpoint, Format.bf16)
        oracle = ReferenceSession(weights, checkpoint.config, Format.bf16)
        oracle.prefill(ids)
        gate = checkpoint.read("gate", 1)
    assert (masks == np.asarray(oracle.active)).mean() > 0.995
    inputs = seen.inputs.astype(np.float32)
    scores = inputs[1] @ gate.T
    clear = np.abs(scores) > 0.05
    np.testing.assert_array_equal(masks[1][clear], (scores > 0)[clear])


def test_a_profile_counts_the_neurons_that_fire(engine, tokens, tmp_path):
    profile = record(engine, tokens, tmp_path / "out", OPTIONS, ignore).profile
    config = engine.config
    counts = np.zeros((2, config.n_layers, config.n_neurons), np.int64)
    overlap = np.zeros(config.n_layers, np.int64)
    positions = np.zeros((config.n_layers, POSITION_BUCKETS), np.int64)
    for name, ids in windows_of(tokens):
        masks = unpacked(engine.open_session().observe(ids).masks, config.n_neurons)
        counts[["one", "two"].index(name)] += masks.sum(1)
        overlap += (masks[:, 1:] & masks[:, :-1]).sum((1, 2))
        for position in range(len(ids)):
            positions[:, int(np.log2(position + 1))] += masks[:, position].sum(1)
    assert profile.n_tokens == 300
    np.testing.assert_array_equal(profile.text_counts, counts)
    np.testing.assert_array_equal(profile.counts, counts.sum(0))
    np.testing.assert_array_equal(profile.overlap, overlap)
    np.testing.assert_array_equal(profile.position_active, positions)
    assert profile.position_tokens.sum() == 300
    assert [text["tokens"] for text in profile.about["texts"]] == [150, 150]
    saved = load_profile(tmp_path / "out" / FILE_NAME)
    np.testing.assert_array_equal(saved.counts, profile.counts)
    assert saved.about == profile.about


def test_a_profile_is_in_the_checkpoints_order_whatever_order_is_packed(engine, tokens, tmp_path):
    straight = record(engine, tokens, tmp_path / "a", OPTIONS, ignore).profile
    with load(engine.folder, profile=tmp_path / "a" / FILE_NAME) as ordered:
        assert ordered.neuron_orders is not None
        again = record(ordered, tokens, tmp_path / "b", OPTIONS, ignore).profile
    # Sums in another order may flip a borderline neuron.
    assert np.abs(again.counts - straight.counts).max() <= 3


def test_a_trace_holds_inputs_masks_and_gates(engine, tokens, tmp_path):
    options = replace(OPTIONS, trace_bytes=64 << 20)
    profile = record(engine, tokens, tmp_path / "a", options, ignore).profile
    profile.save(tmp_path / "profile")
    with load(engine.folder, profile=tmp_path / "profile") as ordered:
        result = record(ordered, tokens, tmp_path / "out", options, ignore)
        trace = load_trace(tmp_path / "out" / "trace")
        assert trace.n_tokens == result.trace_tokens == 300
        assert trace.stride == 1
        first = [ordered.open_session().observe(ids, inputs=True) for _, ids in windows_of(tokens)]
        orders = ordered.neuron_orders
    with open_checkpoint(engine.folder) as checkpoint:
        for layer in range(trace.n_layers):
            part = trace.layer(layer)
            np.testing.assert_array_equal(
                part.gate, checkpoint.read("gate", layer)[orders[layer]].astype(np.float16)
            )
            np.testing.assert_array_equal(
                part.inputs, np.concatenate([o.inputs[layer] for o in first])
            )
            np.testing.assert_array_equal(
                part.masks, np.concatenate([o.masks[layer] for o in first])
            )
            assert part.active().shape == (300, 203)
    assert trace.costs["exact_ns"] > 0
    assert trace.activation == "fatrelu"


@pytest.mark.parametrize("name", slow_except(["hidden 8", "hidden 100"], "hidden 8"))
def test_a_model_of_any_hidden_size_gets_a_profile_and_a_predictor(tokens, tmp_path, name):
    pytest.importorskip("torch", reason="training needs torch")
    folder = write_model(tmp_path / "model", vocab_size=4096, **ODD_SHAPES[name])
    options = replace(OPTIONS, trace_bytes=64 << 20)
    profile, predictor = tmp_path / "profile" / FILE_NAME, tmp_path / "predictor"
    with load(folder) as engine:
        record(engine, tokens, profile.parent, OPTIONS, ignore)
    with load(folder, profile=profile) as engine:
        record(engine, tokens, tmp_path / "out", options, ignore)
    trace = load_trace(tmp_path / "out" / "trace")
    assert trace.layer(0).inputs.shape == (300, ODD_SHAPES[name]["hidden_size"])
    dear = trace.costs | {"exact_ns": 1e12}  # so that a predictor pays
    train(replace(trace, about=trace.about | {"costs": dear}), Options(epochs=1)).save(predictor)
    with load(folder, profile=profile, predictor=predictor) as engine:
        assert engine.prediction.n_predicted_layers == 2
        decode_counted(engine, np.arange(40))


def test_a_trace_is_an_even_sample_within_its_budget(tmp_path):
    writer = TraceWriter(tmp_path, TraceSizes(2, 9, 4), capacity=10)
    sent = 0
    for n in (1, 3, 30, 7, 60):
        inputs = np.zeros((2, n, 4), np.float16)
        inputs[:] = np.arange(sent, sent + n)[None, :, None]
        writer.add(inputs, np.full((2, n, 2), 5, np.uint8))
        sent += n
        assert writer.n_records <= 10
    writer.finish([np.zeros((9, 4), np.float16)] * 2, trace_about())
    trace = load_trace(tmp_path)
    taken = trace.layer(1).inputs[:, 0]
    assert taken.tolist() == list(range(0, sent, trace.stride))
    assert 5 <= trace.n_tokens <= 10


def interrupting(after: int):
    """Return a progress callback that raises KeyboardInterrupt after `after` calls."""
    calls = itertools.count()

    def progress(task: str, done: int, total: int) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("trace_bytes", [0, 200_000])
def test_an_interrupted_recording_continues(engine, tokens, tmp_path, monkeypatch, trace_bytes):
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    options = replace(OPTIONS, trace_bytes=trace_bytes)
    whole = record(engine, tokens, tmp_path / "whole", options, ignore)
    for after in (3, 6, 2):
        with pytest.raises(KeyboardInterrupt):
            record(engine, tokens, tmp_path / "parts", options, interrupting(after))
    parts = record(engine, tokens, tmp_path / "parts", options, ignore)
    assert 0 < parts.n_new_tokens < 300
    for name in ("text_counts", "position_active", "overlap", "overlap_base"):
        np.testing.assert_array_equal(getattr(parts.profile, name), getattr(whole.profile, name))
    if trace_bytes:
        traces = [load_trace(tmp_path / name / "trace") for name in ("whole", "parts")]
        assert traces[0].stride == traces[1].stride > 1
        for layer in range(2):
            np.testing.assert_array_equal(*(trace.layer(layer).inputs for trace in traces))
            np.testing.assert_array_equal(*(trace.layer(layer).masks for trace in traces))
    assert not (tmp_path / "parts" / "recording.json").exists()


@pytest.mark.parametrize("state", ["", "[]", "{}", "[" * 100_000, '{"serial": NaN}'], ids=len)
def test_a_recording_whose_state_is_broken_begins_again(
    engine, tokens, tmp_path, monkeypatch, state
):
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        record(engine, tokens, tmp_path, OPTIONS, interrupting(4))
    (tmp_path / "recording.json").write_text(state)
    result = record(engine, tokens, tmp_path, OPTIONS, ignore)
    assert result.n_new_tokens == 300
    assert [line for line in result.notices if "began again" in line]


NONSENSE = {
    "no texts": {"text": 0, "place": 0, "text_tokens": []},
    "a text too many": {"text_tokens": [0, 0, 0]},
    "a text that does not exist": {"text": 3},
    "a place beyond the text": {"place": 4},
    "a place after the last text": {"text": 2, "place": 1},
    "tokens before the first place": {"place": 0},
    "tokens of a text that was not begun": {"text_tokens": [100, 50]},
    "other tokens than the sums": {"text_tokens": [150, 1]},
    "no trace": {"trace": {}},
    "a part of a trace": {"trace": {"stride": 1}},
    "a stride of zero": {"trace": {"n_records": 150, "stride": 0, "n_seen": 150}},
    "a trace of more tokens than were seen": {
        "trace": {"n_records": 10**6, "stride": 1, "n_seen": 150}
    },
    "a trace of fewer tokens than were seen": {
        "trace": {"n_records": 1, "stride": 1, "n_seen": 150}
    },
    "a trace of other tokens": {"trace": {"n_records": 10, "stride": 1, "n_seen": 10}},
    "a trace that is beyond its budget": {"trace": {"n_records": 3, "stride": 64, "n_seen": 150}},
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_state_that_cannot_be_true_begins_again(engine, tokens, tmp_path, monkeypatch, nonsense):
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    options = replace(OPTIONS, trace_bytes=64 << 20)
    with pytest.raises(KeyboardInterrupt):
        record(engine, tokens, tmp_path, options, interrupting(7))
    path = tmp_path / "recording.json"
    state = json.loads(path.read_text())
    assert (state["text"], state["place"], state["text_tokens"]) == (0, 3, [150, 0])
    path.write_text(json.dumps({**state, **NONSENSE[nonsense]}))
    result = record(engine, tokens, tmp_path, options, ignore)
    assert result.n_new_tokens == result.trace_tokens == result.profile.n_tokens == 300
    assert [line for line in result.notices if "began again" in line]


@pytest.mark.parametrize("broken", ["sums", "trace"])
def test_a_state_whose_files_are_cut_off_begins_again(
    engine, tokens, tmp_path, monkeypatch, broken
):
    """Cut records would be continued as zeros."""
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    options = replace(OPTIONS, trace_bytes=64 << 20)
    with pytest.raises(KeyboardInterrupt):
        record(engine, tokens, tmp_path, options, interrupting(4))
    if broken == "trace":
        with (tmp_path / "trace" / "layer_001.1.part").open("r+b") as file:
            file.truncate(10)
    else:
        (tmp_path / "recording.safetensors").unlink()
    result = record(engine, tokens, tmp_path, options, ignore)
    assert result.n_new_tokens == 300
    assert len(result.notices) == 1


def test_a_sound_state_is_continued_without_a_notice(engine, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    options = replace(OPTIONS, trace_bytes=64 << 20)
    with pytest.raises(KeyboardInterrupt):
        record(engine, tokens, tmp_path, options, interrupting(7))
    result = record(engine, tokens, tmp_path, options, ignore)
    assert result.n_new_tokens == 150
    assert result.notices == ()


def test_a_folder_with_another_recording_is_refused(engine, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        record(engine, tokens, tmp_path / "out", OPTIONS, interrupting(4))
    with pytest.raises(InvalidOption, match="another recording"):
        record(engine, tokens[:1], tmp_path / "out", OPTIONS, ignore)
    record(engine, tokens, tmp_path / "out", OPTIONS, ignore)
    with pytest.raises(InvalidOption, match="finished recording"):
        record(engine, tokens, tmp_path / "out", OPTIONS, ignore)


def test_a_full_disk_is_reported_and_the_recording_can_continue(
    engine, tokens, tmp_path, monkeypatch
):
    options = replace(OPTIONS, trace_bytes=64 << 20)
    add, calls = TraceWriter.add, itertools.count()

    def full(self, inputs, masks):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, inputs, masks)

    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(TraceWriter, "add", full)
    with pytest.raises(HybridError, match="No space left"):
        record(engine, tokens, tmp_path / "out", options, ignore)
    assert not (tmp_path / "out" / FILE_NAME).exists()
    result = record(engine, tokens, tmp_path / "out", options, ignore)
    assert result.profile.n_tokens == result.trace_tokens == 300


def test_a_budget_that_is_too_small_names_the_smallest(engine, tokens, tmp_path):
    with pytest.raises(InvalidOption, match="at least"):
        record(engine, tokens, tmp_path / "out", replace(OPTIONS, trace_bytes=1000), ignore)


def test_a_text_in_which_nothing_fires_is_refused(tmp_path, tokens):
    model = write_model(tmp_path / "model", vocab_size=4096, hidden_act_param=1e6)
    with load(model) as engine, pytest.raises(InvalidOption, match="no neuron fired"):
        record(engine, tokens, tmp_path / "out", OPTIONS, ignore)


def test_silu_is_refused(tmp_path, tokens):
    silu = {"hidden_act": "silu", "hidden_act_param": None}
    model = write_model(tmp_path / "model", vocab_size=4096, **silu)
    with load(model) as engine, pytest.raises(InvalidOption, match="silu"):
        record(engine, tokens, tmp_path / "out", OPTIONS, ignore)


def test_without_text_the_model_writes_its_own(engine, tmp_path, monkeypatch):
    from profiler import corpus

    monkeypatch.setattr(corpus, "PROMPTS", {"english": ["Once"], "code": ["def f("]})
    monkeypatch.setattr(corpus, "WRITTEN_TOKENS", 20)
    profile = record(engine, [], tmp_path / "out", OPTIONS, ignore).profile
    names = [text["name"] for text in profile.about["texts"]]
    assert names == ["self-written: english", "self-written: code"]
    assert 4 < profile.n_tokens <= 60
    assert len(list((tmp_path / "out" / "texts").iterdir())) == 2


def test_texts_are_written_without_the_models_sampling_values(tmp_path, monkeypatch):
    from profiler import corpus

    monkeypatch.setattr(corpus, "WRITTEN_TOKENS", 20)
    other = shutil.copytree(STORIES, tmp_path / "other")
    values = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9}
    values |= {"repetition_penalty": 2.0, "max_new_tokens": 2, "stop_strings": ["e"]}
    (other / "generation_config.json").write_text(json.dumps(values))
    with load("stories") as engine, load(other) as greedy:
        assert greedy.default_sampling.min_p == 0.9
        assert corpus._write(greedy, "Once", 1) == corpus._write(engine, "Once", 1)


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2", "{}", "[]", "[1, true]", "[1, 1.5]", '["a"]', "[4096]", "[-1]", "[" * 100_000],
    ids=lambda content: content[:9],
)
def test_a_kept_text_that_is_broken_is_written_again(engine, tmp_path, monkeypatch, content):
    from profiler import corpus

    monkeypatch.setattr(corpus, "PROMPTS", {"english": ["Once"]})
    monkeypatch.setattr(corpus, "WRITTEN_TOKENS", 4)
    notices = Notices()
    (written,) = corpus.written_corpora(engine, tmp_path, ignore, notices)
    path = tmp_path / "english_00.json"
    before = path.read_bytes()
    assert len(notices) == 0
    path.write_text(content)
    (again,) = corpus.written_corpora(engine, tmp_path, ignore, notices)
    assert again == written
    assert path.read_bytes() == before
    assert [line for line in notices if line.endswith("it was written again")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_kept_text_that_is_a_pipe_does_not_wait(engine, tmp_path, monkeypatch):
    from profiler import corpus

    monkeypatch.setattr(corpus, "PROMPTS", {"english": ["Once"]})
    monkeypatch.setattr(corpus, "WRITTEN_TOKENS", 4)
    os.mkfifo(tmp_path / "english_00.json")
    notices = Notices()
    corpus.written_corpora(engine, tmp_path, ignore, notices)
    assert "is not a regular file but a pipe" in next(iter(notices))
    assert (tmp_path / "english_00.json").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_tokenizer_that_became_a_pipe_is_named(engine, tokens, tmp_path):
    path = tmp_path / "model" / "tokenizer.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(HybridError, match=r"tokenizer\.json: is not a regular file but a pipe"):
        record(engine, tokens, tmp_path / "out", OPTIONS, ignore)


def test_a_synthetic_model_gets_random_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    with load("synthetic:tiny") as engine:
        options = replace(OPTIONS, window=512)
        profile = record(engine, [], tmp_path / "out", options, ignore).profile
    assert profile.n_tokens == 2 * 4096
    assert profile.sparsity.mean() == pytest.approx(0.879, abs=0.03)


def text_windows(engine, path, separator=None, window=16, place=0):
    return list(TextFile(path, separator).windows(engine, window, place))


def test_texts_are_read_in_parts(engine, tmp_path, monkeypatch):
    from profiler import corpus

    story = TEXT.read_text(encoding="utf-8")
    path = tmp_path / "text.txt"
    path.write_text(story, encoding="utf-8")
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 64)
    windows = text_windows(engine, path)
    (bos,) = engine.tokenizer.bos
    assert all(ids[0] == bos and len(ids) <= 16 for ids, _ in windows)
    ids = [token for ids, _ in windows for token in ids[1:]]
    assert engine.tokenizer.decode(ids).replace(" ", "") == story.replace(" ", "")
    places = [place for _, place in windows]
    assert places == sorted(places)
    assert places[-1] == path.stat().st_size
    # From any place that it reported, reading continues with the same windows.
    ends = [i for i in range(1, len(windows)) if places[i] > places[i - 1]]
    assert len(ends) > 3
    for end in ends:
        assert text_windows(engine, path, place=places[end]) == windows[end + 1 :]


def test_each_document_begins_a_new_window(engine, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time.\n<end>\nThe cat sat.\n<end>\nThe end.", encoding="utf-8")
    texts = [
        engine.tokenizer.decode(ids[1:]).strip() for ids, _ in text_windows(engine, path, "<end>")
    ]
    assert texts == ["Once upon a time.", "The cat sat.", "The end."]


@pytest.mark.parametrize("separator", [None, "<end>"])
def test_a_byte_order_mark_is_left_out_and_line_ends_stay(engine, tmp_path, separator):
    path, marked = tmp_path / "text.txt", tmp_path / "marked.txt"
    path.write_bytes(b"Once upon a time.\r\n<end>The cat\r\nsat.")
    marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    windows = text_windows(engine, path, separator)
    decoded = "".join(engine.tokenizer.decode(ids[1:]) for ids, _ in windows)
    # The line ends around a separator belong to no document.
    assert decoded.count("\r") == decoded.count("\r\n") == (1 if separator else 2)
    others = text_windows(engine, marked, separator)
    assert [ids for ids, _ in others] == [ids for ids, _ in windows]
    assert others[-1][1] == windows[-1][1] + 3
    (kept,) = TextFile(path).notices
    assert "CR LF" in kept
    assert len(TextFile(marked).notices) == 2
    marked.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InvalidOption, match="no text"):
        TextFile(marked)


def test_notes_about_a_text_are_printed(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfOnce upon a time.")
    assert main(["-o", str(tmp_path / "out"), "--text", str(path)]) == 0
    assert f"note: --text {path}: begins with a byte-order mark" in capsys.readouterr().err


def noted(folder: Path) -> Path:
    """Write a model about which there is a notice."""
    write_model(folder, vocab_size=4096)
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    return folder


@pytest.mark.parametrize("command", ["record", "sparsity"])
def test_notes_about_a_model_are_printed(tmp_path, capsys, command):
    options = ["-m", str(noted(tmp_path / "model")), "--text", str(TEXT)]
    if command == "record":
        assert main([*options, "-o", str(tmp_path / "out"), "--max-tokens", "20"]) == 0
    else:
        assert sparsity.main(options) == 0
    assert re.search("^note: .*num_beams", capsys.readouterr().err, re.MULTILINE)


def test_bos_may_be_left_out(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time", encoding="utf-8")
    counts = []
    for option in ("--bos", "--no-bos"):
        out = tmp_path / option
        assert main(["--text", str(path), "-o", str(out), option]) == 0
        counts.append(load_profile(out / FILE_NAME).n_tokens)
    assert counts == [5, 4]
    args = setup.parse_arguments(["--text", str(path), "--no-bos"])
    assert load_options(args).add_bos is False


def test_a_recording_with_another_bos_is_not_continued(tmp_path, monkeypatch):
    from profiler import corpus

    monkeypatch.setattr(recorder, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 64)  # a place after each
    model = write_model(tmp_path / "model", vocab_size=4096)
    texts, out = [TextFile(TEXT)], tmp_path / "out"
    with load(model) as engine, pytest.raises(KeyboardInterrupt):
        record(engine, texts, out, OPTIONS, interrupting(4))
    with (
        load(model, add_bos=False) as engine,
        pytest.raises(InvalidOption, match="another recording"),
    ):
        record(engine, texts, out, OPTIONS, ignore)


def test_a_window_without_room_for_text_is_refused(tmp_path, capsys):
    model = write_model(tmp_path / "model", vocab_size=4096)
    change_json(model / "tokenizer.json", post_processor=template(["<unk>", "<s>"]))
    options = ["-m", str(model), "--text", str(TEXT), "-o", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*options, "--window", "2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("profiler.record: a window of 2 tokens has no room for text")
    assert main([*options, "--window", "3", "--max-tokens", "9"]) == 0


def test_characters_are_not_cut(engine, tmp_path, monkeypatch):
    from profiler import corpus

    path = tmp_path / "text.txt"
    path.write_text("你好世界" * 50, encoding="utf-8")
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 50)
    ids = [token for window, _ in text_windows(engine, path) for token in window[1:]]
    assert engine.tokenizer.decode(ids).replace(" ", "") == "你好世界" * 50


def test_the_command_records_once(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--text", str(TEXT), "-o", str(out), "--window", "64", "--trace"]
    assert main([*arguments, "--trace-budget", "16MiB"]) == 0
    assert "of neurons inactive" in capsys.readouterr().out
    assert load_profile(out / FILE_NAME).about["model"] == "stories"
    assert load_trace(out / "trace").n_tokens > 100
    assert main(arguments) == 2  # finished
    assert "finished recording" in capsys.readouterr().err


def test_bad_options_give_one_line_of_error(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"ok \xff\xfe")
    for arguments, message in (
        (["--text", str(tmp_path / "nowhere")], "No such file"),
        (["--text", str(empty)], "no text"),
        (["--text", str(broken)], "not UTF-8 text (byte 3)"),
        (["--text", str(TEXT), "-m", "no-such-model"], "no-such-model"),
    ):
        assert main([*arguments, "-o", str(tmp_path / "out")]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for arguments in (["--trace-budget", "2GiB"], ["--trace", "--trace-budget", "much"]):
        with pytest.raises(SystemExit):
            main([*arguments, "-o", str(tmp_path / "out")])


def test_buckets_are_powers_of_two():
    assert position_buckets(9).tolist() == [0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert position_buckets(1 << 17).max() == POSITION_BUCKETS - 1


def test_sums_of_masks_by_hand():
    sums = ActivationSums(1, 1, 9)
    masks = np.array([[[0b101, 1], [0b100, 1], [0, 0]]], np.uint8)
    sums.add(masks, 0)
    assert sums.text_counts[0, 0, :9].tolist() == [1, 0, 2, 0, 0, 0, 0, 0, 2]
    assert sums.overlap.tolist() == [2]
    assert sums.overlap_base.tolist() == [2]
    assert sums.position_active[0, :2].tolist() == [3, 2]
    assert sums.n_tokens == 3


def test_hybrid_loads_neither_numba_nor_torch():
    import subprocess
    import sys

    code = (
        "import sys, hybrid; e = hybrid.load('stories'); "
        "assert not {'numba', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hybrid.load is load
