"""Multiple-choice questions: measures how often a model finds the right continuation likeliest.

Files are JSONL in the forms in which the data sets are published. Each question becomes the text
that EleutherAI's lm-evaluation-harness 0.4.13 makes of it, and is scored as there
(https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks/{hellaswag,piqa,arc}): plain, by
the continuation's log-likelihood ("acc"), and normalised by the choice's length in characters
("acc_norm"). A choice follows its context after one space, also if it begins with a space.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.engine.engine import Engine
from hybrid.errors import InvalidOption
from hybrid.evaluation.fp32 import EvaluatedSession, Fp32Engine
from hybrid.evaluation.likelihood import Scorer, encode_pair
from hybrid.files import read_bytes
from hybrid.progress import Progress, ignore_progress
from hybrid.text.text_file import decode_text

_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Question:
    """A context and its possible continuations, each without the space between the two."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    line: int  # line number in the file


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answers to a question: indices of choices."""

    log_likelihoods: tuple[float, ...]  # of each choice
    plain: int  # the likeliest choice
    normalised: int  # the one of the greatest log-likelihood per character


@dataclass(frozen=True, slots=True)
class Accuracy:
    n_questions: int
    plain: float  # share of questions whose likeliest choice is right
    normalised: float  # the same by log-likelihood per character
    chance: float  # expected share of a random guess

    @property
    def plain_error(self) -> float:
        """Standard error."""
        return math.sqrt(self.plain * (1 - self.plain) / self.n_questions)

    @property
    def normalised_error(self) -> float:
        return math.sqrt(self.normalised * (1 - self.normalised) / self.n_questions)


def _hellaswag(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """{activity_label, ctx_a, ctx_b, endings, label}.

    `capitalize` also makes the rest of ctx_b lower case. An ending may begin with a space once its
    brackets are gone.
    """

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    answer = row["label"] if label is None else label
    return clean(context), [clean(ending) for ending in row["endings"]], _index(answer)


def _piqa(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """{goal, sol1, sol2, label}; the labels are published in a separate file."""
    answer = row["label"] if label is None else label
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], _index(answer)


def _arc(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """AI2's {question: {stem, choices: [{text, label}]}, answerKey}, or Hugging Face's {question,
    choices: {text: […], label: […]}, answerKey}.
    """
    question = row["question"]
    if isinstance(question, dict):
        stem = question["stem"]
        texts = [choice["text"] for choice in question["choices"]]
        labels = [choice["label"] for choice in question["choices"]]
    else:
        stem, texts, labels = question, row["choices"]["text"], row["choices"]["label"]
    answer = row["answerKey"] if label is None else label
    return f"Question: {stem}\nAnswer:", texts, labels.index(answer)


def _plain(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """{context, choices: […], answer: index}."""
    return row["context"], row["choices"], _index(row["answer"] if label is None else label)


def _index(label: object) -> int:
    """Return a label, which may be written as text, as an integer. Raises ValueError."""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"expected the index of the right choice, found {label!r:.40}")
    return int(label)


Form = Callable[[dict[str, Any], "str | None"], tuple[str, list[str], int]]
FORMS: dict[str, Form] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "arc": _arc,
    "plain": _plain,
}
_TELLTALES = {"endings": "hellaswag", "goal": "piqa", "answerKey": "arc", "context": "plain"}


def read_questions(
    path: Path, form: str = "auto", *, labels: Path | None = None, limit: int | None = None
) -> list[Question]:
    """Read the questions of a JSONL file.

    `labels` is a separate file with one answer per line, if `path` has none. Raises InvalidOption,
    which names the line, if a question is not in the form.
    """
    lines = _lines(path)
    answers = None if labels is None else _lines(labels)
    if answers is not None and len(answers) != len(lines):
        raise InvalidOption(
            f"--labels {labels}: has {len(answers)} lines, expected {len(lines)} as in --file"
        )
    questions = []
    for index, (number, line) in enumerate(lines[:limit]):
        where = f"--file {path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidOption(f"{where}: is not JSON ({error})") from error
        except RecursionError:
            raise InvalidOption(f"{where}: is nested too deeply") from None
        if not isinstance(row, dict):
            raise InvalidOption(f"{where}: expected an object")
        name = form if form != "auto" else _form_of(row, where)
        try:
            label = None if answers is None else answers[index][1]
            context, choices, answer = FORMS[name](row, label)
        except KeyError as error:
            raise InvalidOption(f"{where}: has no field {error}, expected in {name}") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise InvalidOption(f"{where}: is not in the form {name} ({error})") from error
        is_text = isinstance(context, str) and isinstance(choices, list)
        is_text = is_text and all(isinstance(choice, str) for choice in choices)
        if not is_text or len(choices) < 2:
            raise InvalidOption(f"{where}: expected a context and two choices or more, all texts")
        if not 0 <= answer < len(choices):
            raise InvalidOption(f"{where}: answer {answer} is not one of {len(choices)} choices")
        questions.append(Question(context, tuple(choices), answer, number))
    return questions


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers. Raises InvalidOption.

    A byte-order mark and the line ends are not part of any question, so they need no notice.
    """
    try:
        text = decode_text(read_bytes(path, _MAX_BYTES))
    except OSError as error:
        raise InvalidOption(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidOption(f"{path}: not UTF-8 text (byte {error.start})") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidOption(f"{path}: is empty")
    return lines


def _form_of(row: dict[str, Any], where: str) -> str:
    for field, form in _TELLTALES.items():
        if field in row:
            return form
    raise InvalidOption(f"{where}: unknown form; expected one of {', '.join(FORMS)} (--form)")


def measure_choices(
    engine: Engine | Fp32Engine,
    questions: list[Question],
    *,
    progress: Progress = ignore_progress,
) -> Accuracy:
    """Score all questions.

    Raises InvalidOption for a question longer than the context, and NumericOverflow if logits are
    not finite.
    """
    n_plain = n_normalised = 0
    with engine.open_session() as session:
        for index, question in enumerate(questions):
            progress("answering, questions", index, len(questions))
            found = answer(engine, session, question)
            n_plain += found.plain == question.answer
            n_normalised += found.normalised == question.answer
    n = len(questions)
    progress("answering, questions", n, n)
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return Accuracy(n, n_plain / n, n_normalised / n, chance)


def answer(engine: Engine | Fp32Engine, session: EvaluatedSession, question: Question) -> Answer:
    """Answer one question. The first of equal choices wins; an empty choice never wins normalised.

    Raises InvalidOption if the question is longer than the context, or a choice has no token.
    """
    scorer = Scorer(session)
    found = []
    for choice in question.choices:
        context, continuation = encode_pair(engine, question.context, f" {choice}")
        n_tokens = len(context) + len(continuation)
        if n_tokens - 1 > engine.n_context:  # the last token is predicted, but never read
            raise InvalidOption(
                f"line {question.line}: has {n_tokens} tokens, but the context has "
                f"{engine.n_context}"
            )
        if not continuation:
            raise InvalidOption(
                f"line {question.line}: the choice {choice!r:.40} has no token of its own"
            )
        found.append(scorer.score(context, continuation).logprob)
    likelihoods = np.array(found)
    with np.errstate(divide="ignore"):  # an empty choice: minus infinity
        per_character = likelihoods / np.array([len(choice) for choice in question.choices])
    return Answer(tuple(found), int(likelihoods.argmax()), int(per_character.argmax()))
