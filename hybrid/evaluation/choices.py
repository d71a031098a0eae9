"""Multiple-choice questions: measures how often a model finds the right continuation likeliest.

The scores are those of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness):
plain, by the continuation's log-likelihood ("acc"), and normalised by its length in characters
("acc_norm"). Files are JSONL in the forms in which the data sets are published.
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
from hybrid.engine.oracle.comparison import finite_losses
from hybrid.errors import InvalidOption
from hybrid.evaluation.fp32 import EvaluatedSession, Fp32Engine
from hybrid.progress import Progress, ignore_progress


@dataclass(frozen=True, slots=True)
class Question:
    """A context and its possible continuations. Each begins with the space that separates it."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    line: int  # line number in the file


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
    """{ctx or ctx_a and ctx_b, endings, label, activity_label}, cleaned as in the harness."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    if "ctx_a" in row:
        context = f"{row['ctx_a']} {row['ctx_b'][:1].upper()}{row['ctx_b'][1:]}"
    else:
        context = row["ctx"]
    if row.get("activity_label"):
        context = f"{row['activity_label']}: {context}"
    return clean(context), [clean(ending) for ending in row["endings"]], int(row["label"])


def _piqa(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """{goal, sol1, sol2, label}; the labels are published in a separate file."""
    answer = int(row["label"] if label is None else label)
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], answer


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
    return f"Question: {stem}\nAnswer:", texts, labels.index(row["answerKey"])


def _plain(row: dict[str, Any], label: str | None) -> tuple[str, list[str], int]:
    """{context, choices: […], answer: index}."""
    return row["context"], row["choices"], int(row["answer"])


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
        is_text = isinstance(context, str) and all(isinstance(choice, str) for choice in choices)
        if not is_text or len(choices) < 2 or not all(choices):
            raise InvalidOption(f"{where}: expected a context and two choices or more, all texts")
        if not 0 <= answer < len(choices):
            raise InvalidOption(f"{where}: answer {answer} is not one of {len(choices)} choices")
        spaced = tuple(choice if choice[0].isspace() else f" {choice}" for choice in choices)
        questions.append(Question(context, spaced, answer, number))
    return questions


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers. Raises InvalidOption."""
    try:
        text = path.read_text(encoding="utf-8")
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
            likelihoods = np.array(log_likelihoods(engine, session, question))
            lengths = np.array([len(choice.strip()) for choice in question.choices])
            n_plain += int(likelihoods.argmax()) == question.answer
            n_normalised += int((likelihoods / lengths).argmax()) == question.answer
    n = len(questions)
    progress("answering, questions", n, n)
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return Accuracy(n, n_plain / n, n_normalised / n, chance)


def log_likelihoods(
    engine: Engine | Fp32Engine, session: EvaluatedSession, question: Question
) -> list[float]:
    """Return the log-likelihood of each choice after the context.

    As in the harness, context and choice are tokenised together. The tokens that follow as many as
    the context alone has count as the choice.
    """
    context = engine.tokenizer.encode(question.context)
    sequences = [engine.tokenizer.encode(question.context + choice) for choice in question.choices]
    longest = max(map(len, sequences))
    if longest > engine.n_context:
        raise InvalidOption(
            f"line {question.line}: has {longest} tokens, but the context has {engine.n_context}"
        )
    session.reset()
    n_read, read = 0, context[:0]
    likelihoods = []
    for ids in sequences:
        # All tokens of the context but the last are common to the choices, unless tokenising them
        # together with a choice changed them.
        n_context = max(1, min(len(context), len(ids) - 1))
        n_common = 0
        while n_common < min(n_read, n_context - 1) and read[n_common] == ids[n_common]:
            n_common += 1
        session.truncate(n_common)
        if n_context - 1 > n_common:
            session.prefill(ids[n_common : n_context - 1])
        n_read, read = n_context - 1, ids
        logits = session.prefill(ids[n_context - 1 : -1], all_logits=True)
        assert logits is not None
        likelihoods.append(-float(finite_losses(logits, np.array(ids[n_context:])).sum()))
        session.truncate(n_read)
    return likelihoods
