"""Perplexity counts every token once, with the context that its window gives it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import hybrid
from hybrid import InvalidOption, eval
from hybrid.evaluation import likelihood, measure_perplexity

TEXT = "Once upon a time there was a little cat. The cat was happy and played all day. " * 6


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=2) as engine:
        yield engine


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize(("window", "stride"), [(512, None), (40, 20), (40, 39), (7, 1), (2, 1)])
def test_each_token_is_predicted_once_from_its_window(engine, window, stride, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 16)
    ids = engine.tokenizer.encode(TEXT)
    result = measure_perplexity(engine, TEXT, window=window, stride=stride)
    step = stride or window // 2
    expected = 0.0
    for target in range(1, len(ids)):
        # The first window that holds the token predicts it.
        first = next(f for f in range(0, len(ids), step) if f + window > target)
        with engine.open_session() as session:
            session.prefill(ids[first:target])
            expected -= log_softmax(session.logits)[ids[target]]
    assert result.n_tokens == len(ids) - 1
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / len(TEXT), rel=1e-5)


def test_a_story_is_predicted_better_than_noise(engine):
    letters = np.random.default_rng(0).choice(list("abcdefgh "), len(TEXT))
    story = measure_perplexity(engine, TEXT)
    noise = measure_perplexity(engine, "".join(letters))
    assert story.bits_per_byte < noise.bits_per_byte / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 1}, "window"), ({"window": 10**6}, "window"), ({"stride": 0}, "stride")]
    + [({"window": 8, "stride": 8}, "stride")],
)
def test_sizes_that_do_not_fit_are_refused(engine, options, message):
    with pytest.raises(InvalidOption, match=message):
        measure_perplexity(engine, TEXT, **options)


def test_the_command_prints_json(tmp_path, capsys):
    path = tmp_path / "a text.txt"
    path.write_text(TEXT)
    assert eval.main(["perplexity", "--text", str(path), "--json", "--window", "64"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["n_bytes"] == len(TEXT)
    assert summary["stride"] == 32
    assert 1 < summary["perplexity"] < 30
    assert eval.main(["perplexity", "--text", str(path), "--window", "64"]) == 0
    assert f"perplexity {summary['perplexity']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("quant", ["q8", "fp32"])
def test_bos_may_be_left_out(tmp_path, capsys, quant):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time", encoding="utf-8")
    counts = []
    for options in ([], ["--no-bos"]):
        arguments = ["perplexity", "--text", str(path), "--json", "--quant", quant, *options]
        assert eval.main(arguments) == 0
        counts.append(json.loads(capsys.readouterr().out)["n_tokens"])
    assert counts == [4, 3]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b" \n", "no text"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_file_without_text_gives_one_line_of_error(tmp_path, capsys, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert eval.main(["perplexity", "--text", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def measured(path, capsys) -> tuple[dict, str]:
    assert eval.main(["perplexity", "--text", str(path), "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode())
    plain, err = measured(path, capsys)
    assert "note" not in err
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    marked, err = measured(path, capsys)
    assert marked == plain
    assert f"note: --text {path}: begins with a byte-order mark, which is left out\n" in err
    path.write_bytes(b"\xef\xbb\xbf")
    assert eval.main(["perplexity", "--text", str(path)]) == 2
    assert "no text" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_stay_as_they_are(engine, tmp_path, capsys, end):
    text = TEXT.replace(". ", "." + end)
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    result, err = measured(path, capsys)
    assert result["n_bytes"] == len(text)
    expected = measure_perplexity(engine, text).perplexity
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)
    note = f"note: --text {path}: has lines that end in CR LF, which stay: the model reads both\n"
    assert (note in err) == (end == "\r\n")


def test_a_missing_file_gives_one_line_of_error(capsys):
    assert eval.main(["perplexity", "--text", "/no/such/text"]) == 2
    assert "No such file" in capsys.readouterr().err
