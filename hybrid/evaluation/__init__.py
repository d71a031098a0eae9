"""Measures a model's perplexity on a text, and its accuracy on multiple-choice questions.

The model runs on the native engine, or in fp32 on the oracle, to compare with other
implementations. speed.py measures how fast an engine is.
"""

from hybrid.evaluation.choices import Accuracy, Question, measure_choices, read_questions
from hybrid.evaluation.fp32 import Fp32Engine
from hybrid.evaluation.perplexity import Perplexity, measure_perplexity

__all__ = [
    "Accuracy",
    "Fp32Engine",
    "Perplexity",
    "Question",
    "measure_choices",
    "measure_perplexity",
    "read_questions",
]
