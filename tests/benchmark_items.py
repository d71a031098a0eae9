"""Write questions of our own in the forms of HellaSwag, PIQA and ARC.

Their texts are children's stories, because the small models that tests can have write such. The
rest is what makes real files difficult: odd white space, brackets, capitals and foreign letters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Item = dict[str, Any]

NAMES = ("Lily", "Tom", "Mia", "Ben", "Sara", "Max", "The little robot", "An old bear")
PLACES = ("park", "garden", "forest", "kitchen", "big house", "river")
THINGS = ("red ball", "toy car", "small boat", "blue hat", "cake", "kite")
FEELINGS = ("happy", "sad", "scared", "very tired", "proud")
TITLES = ("Playing in the park", "Baking a cake", "Finance and Business", "Having a picnic")
# Continuations: the first fits a story, the others fit less and less.
SUITABLE = (
    "went home and told {who} mom all about it.",
    "played together and had a lot of fun.",
    'smiled and said, "Thank you!"',
    "was so {feeling} that {who} friends came to help.",
    "found a {thing} under a tree.",
)
UNSUITABLE = (
    "the the of to {thing} {thing} and.",
    "invoiced the municipal treasurer for quarterly dividends.",
    "{place} went of {feeling} because mom.",
    "told mom all home about it and went.",
    "is a polynomial of degree nine.",
    "RAN AWAY IN CAPITALS, {feeling} AND LOUD.",
)


def fill(text: str, rng: random.Random) -> str:
    return text.format(
        who=rng.choice(("her", "his", "their")),
        thing=rng.choice(THINGS),
        place=rng.choice(PLACES),
        feeling=rng.choice(FEELINGS),
    )


# Each makes a text odd in one manner.
ODDITIES: tuple[Callable[[str], str], ...] = (
    lambda text: f"  {text}",
    lambda text: f"{text}  ",
    lambda text: f"\t{text}\n",
    lambda text: f"\u00a0{text}\u2003",
    lambda text: text.replace(" ", "  ", 2),
    lambda text: text.replace(" ", "   ", 1),
    lambda text: f"[header] {text}",
    lambda text: f"[substeps]{text} [step]",
    lambda text: text.replace(" ", " [title] ", 1),
    lambda text: f"{text} [title] Then",
    lambda text: f"{text} [unclosed",
    lambda text: f"a [b [c] d] {text}",
    lambda text: text.replace(" ", "\n", 1),
    lambda text: f"{text} [line\nbreak]",
    lambda text: text.replace("a", "á").replace("o", "ö"),
    lambda text: f"{text} — “naïve” 你好 🙂",
    lambda text: text.upper(),
    lambda text: f"ǆ ß ŉ {text}",
    lambda text: f"{text} e\u0301\u200b",
    lambda text: f"{text} {{braces}} {{% if %}} \\n 'quotes' \"both\"",
)


def odd(text: str, rng: random.Random, share: float = 0.5) -> str:
    return rng.choice(ODDITIES)(text) if rng.random() < share else text


def choices(n: int, rng: random.Random) -> tuple[list[str], int]:
    """Return `n` continuations and the index of the suitable one."""
    texts = [fill(rng.choice(SUITABLE), rng)]
    texts += [fill(text, rng) for text in rng.sample(UNSUITABLE, n - 1)]
    order = rng.sample(range(n), n)
    return [odd(texts[index], rng) for index in order], order.index(0)


def hellaswag(index: int, rng: random.Random) -> Item:
    endings, answer = choices(4, rng)
    begins = (
        "she",
        "He suddenly",
        "the BEAR and Mom",
        "",
        " then they",
        "ÉVA",
        "ﬁnally he",
        "[step] it",
    )
    return {
        "ind": index,
        "activity_label": odd(rng.choice(TITLES), rng, 0.2),
        "ctx_a": odd(
            f"{rng.choice(NAMES)} had a {rng.choice(THINGS)} in the {rng.choice(PLACES)}.", rng
        ),
        "ctx_b": odd(begins[index % len(begins)], rng, 0.3),
        "endings": endings,
        "label": str(answer),
    }


def piqa(index: int, rng: random.Random) -> Item:
    texts, answer = choices(2, rng)
    goal = f"How can {rng.choice(NAMES)} find the {rng.choice(THINGS)} in the {rng.choice(PLACES)}?"
    return {"goal": odd(goal, rng), "sol1": texts[0], "sol2": texts[1], "label": answer}


def arc(index: int, rng: random.Random) -> Item:
    n = 3 + index % 3
    texts, answer = choices(n, rng)
    labels = list("ABCDE" if index % 2 else "12345")[:n]
    question = f"What did {rng.choice(NAMES)} do with the {rng.choice(THINGS)}?"
    return {
        "id": f"q{index}",
        "question": odd(question, rng),
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[answer],
    }


FORMS: dict[str, Callable[[int, random.Random], Item]] = {
    "hellaswag": hellaswag,
    "piqa": piqa,
    "arc": arc,
}


def write_items(path: Path, form: str, n: int = 50) -> Path:
    """Write `n` questions as JSONL, the same ones each time."""
    rng = random.Random(form)
    rows = [json.dumps(FORMS[form](index, rng), ensure_ascii=False) for index in range(n)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="")
    return path
