"""Multiple-choice files are read in their published forms, and likelihoods are the model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import STORIES

import hybrid
from hybrid import InvalidOption, eval
from hybrid.evaluation import Question, measure_choices, read_questions
from hybrid.evaluation.choices import answer
from hybrid.evaluation.fp32 import Fp32Engine
from hybrid.evaluation.likelihood import Likelihood

HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A woman opens [header] an oven.",
    "ctx_b": "she and Tom",
    "ctx": "unused",
    "endings": ["takes out a cake. ", "[step] rides  a horse [title] away."],
    "label": "0",
}
PIQA = {"goal": "How to open a jar?", "sol1": "Twist the lid.", "sol2": "Eat the lid."}
ARC_AI2 = {
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}],
    },
    "answerKey": "B",
}
ARC_HF = {
    "question": "What is cold?",
    "choices": {"text": ["ice", "fire", "sun"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
PLAIN = {"context": "The cat", "choices": ["sat.", " ran away."], "answer": 1}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories") as engine:
        yield engine


def test_forms_are_recognised_by_their_fields(tmp_path):
    labels = tmp_path / "labels.lst"
    labels.write_text("0\n0\n0\n0\n0\n")
    rows = (HELLASWAG, ARC_AI2, ARC_HF, PLAIN)
    questions = read_questions(write(tmp_path / "q", *rows))
    assert questions[0] == Question(
        "Baking: A woman opens an oven. She and tom",
        ("takes out a cake.", " rides a horse. away."),
        0,
        1,
    )
    assert questions[1] == Question("Question: What is hot?\nAnswer:", ("ice", "fire"), 1, 2)
    assert questions[2].choices == ("ice", "fire", "sun")
    assert questions[3] == Question("The cat", ("sat.", " ran away."), 1, 4)
    piqa = write(tmp_path / "p", PIQA, PIQA)
    labels.write_text("0\n1\n")
    assert [q.answer for q in read_questions(piqa, labels=labels)] == [0, 1]
    assert len(read_questions(piqa, labels=labels, limit=1)) == 1
    assert [q.answer for q in read_questions(write(tmp_path / "p", PIQA | {"label": 1}))] == [1]


def test_separate_labels_are_used_in_every_form(tmp_path):
    labels = tmp_path / "labels.lst"
    labels.write_bytes(b"\xef\xbb\xbf1\r\n1\r\nA\r\n3\r\n0\r\n")
    rows = (HELLASWAG, PIQA, ARC_AI2, ARC_HF, PLAIN)
    questions = read_questions(write(tmp_path / "q", *rows), labels=labels)
    assert [question.answer for question in questions] == [1, 1, 0, 2, 0]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_line_ends_are_not_part_of_a_question(tmp_path, end):
    path = write(tmp_path / "q", PLAIN, ARC_HF)
    expected = read_questions(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end))
    assert read_questions(path) == expected


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "context", ["Once upon a time there was a little", "T", "One day, Li", "They sat. \n", "", " "]
)
def test_likelihoods_are_those_of_the_whole_text(engine, context):
    question = Question(
        context, ("girl who had a red ball.", " dog", "ly went home", "", "x y"), 0, 1
    )
    with engine.open_session() as session:
        actual = answer(engine, session, question).log_likelihoods
        # What an earlier question left in the session does not matter.
        assert answer(engine, session, question).log_likelihoods == actual
    for choice, likelihood in zip(question.choices, actual, strict=True):
        ids = engine.tokenizer.encode(f"{context} {choice}")  # one space, also before a space
        n_context = len(engine.tokenizer.encode(context.rstrip()))
        logits = engine.open_session().prefill(ids[:-1], all_logits=True)
        logprobs = log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        assert likelihood == pytest.approx(logprobs[n_context - 1 :].sum(), rel=1e-5)


def test_the_model_knows_its_stories(engine, tmp_path):
    rows = [
        {"context": "Once upon a", "choices": ["time", "xylophone"], "answer": 0},
        {"context": "Lily was very", "choices": ["the of", "happy"], "answer": 1},
        {"context": "They played in the", "choices": ["park", "very because"], "answer": 0},
        {"context": "They played in the", "choices": ["park", "very because"], "answer": 1},
    ]
    result = measure_choices(engine, read_questions(write(tmp_path / "q", *rows)))
    assert result.n_questions == 4
    assert result.plain == 0.75
    assert result.plain_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert result.chance == 0.5


def test_length_is_normalised_by_characters(monkeypatch, engine):
    from hybrid.evaluation import choices

    class FakeScorer:
        def __init__(self, session):
            self.logprobs = iter((-4.0, -6.0, -3.0))

        def score(self, context, continuation):
            return Likelihood(next(self.logprobs), False)

    monkeypatch.setattr(choices, "Scorer", FakeScorer)
    with engine.open_session() as session:
        # -4 / 2 against -6 / 7, spaces of the choice included; an empty choice never wins.
        found = answer(engine, session, Question("a", ("bc", " defghi", ""), 1, 1))
    assert (found.plain, found.normalised) == (2, 1)


def test_fp32_is_near_the_native_engine(engine):
    question = Question("Once upon a time there was a little", ("girl who", "dog", "dream"), 0, 1)
    with engine.open_session() as session:
        native = answer(engine, session, question).log_likelihoods
    fp32 = Fp32Engine(STORIES)
    with fp32.open_session() as session:
        actual = answer(fp32, session, question).log_likelihoods
    np.testing.assert_allclose(actual, native, atol=0.15)


BAD = {
    "empty": ("", "is empty"),
    "no JSON": ('{"context": "a", "choices": ["b", "c"], "answer": 0}\n\nnot json', "line 3"),
    "nested": ("[" * 200_000, "line 1: is nested too deeply"),
    "no object": ("[1, 2]", "expected an object"),
    "unknown form": ('{"text": "a"}', "unknown form"),
    "missing field": ('{"context": "a", "choices": ["b", "c"]}', "no field 'answer'"),
    "answer beyond": ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2"),
    "one choice": ('{"context": "a", "choices": ["b"], "answer": 0}', "two choices"),
    "no label": (json.dumps(PIQA), "no field 'label'"),
    "no such key": (json.dumps(ARC_AI2 | {"answerKey": "Z"}), "form arc"),
    "fraction": ('{"context": "a", "choices": ["b", "c"], "answer": 0.5}', "found 0.5"),
    "no capitals": (json.dumps({**HELLASWAG, "ctx_b": None}), "not in the form hellaswag"),
    "text as list": ('{"context": "a", "choices": "bc", "answer": 0}', "two choices"),
    "wrong type": ('{"context": 3, "choices": ["b", "c"], "answer": 0}', "all texts"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_files_name_the_line(tmp_path, capsys, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    assert eval.main(["choices", "--file", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_labels_must_be_as_many_as_questions(tmp_path):
    labels = tmp_path / "labels"
    labels.write_text("0\n")
    with pytest.raises(InvalidOption, match="1 lines, expected 2 as in --file"):
        read_questions(write(tmp_path / "q", PIQA, PIQA), labels=labels)


def test_a_question_beyond_the_context_names_its_line(engine):
    with pytest.raises(InvalidOption, match=r"line 7: has \d+ tokens, but the context has 512"):
        measure_choices(engine, [Question("word " * 600, ("a", "b"), 0, 7)])


def test_the_command_prints_json_or_a_table(tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", *[PLAIN] * 3)
    assert eval.main(["choices", "--file", str(path), "--json", "--limit", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["n_questions"] == 2
    assert summary["acc"] in (0.0, 1.0)
    assert summary["chance"] == 0.5
    assert eval.main(["choices", "--file", str(path), "--limit", "1", "--kv", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "chance 50.0%" in out
    assert out.endswith("1 questions; stories, q8, KV cache bf16\n")
