"""How good is a model? Its perplexity on a text, its accuracy on multiple-choice questions; through
the native engine, or in fp32 through the oracle, to compare with other implementations.
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
