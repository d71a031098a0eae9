"""GenerationDefaults: what a model's generation_config.json says about its answers.

The file is read as transformers reads it (https://huggingface.co/docs/transformers/main_classes/text_generation),
with two differences. A file that gives sampling values without do_sample is read as sampling, and a
stop string is not part of the text. A value that makes no sense never stops the loading of a model:
a notice says what is not followed.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybrid.checkpoint.hf import known_token_ids
from hybrid.checkpoint.json_file import read_object
from hybrid.checkpoint.name import model_name
from hybrid.text.added_tokens import is_text
from hybrid.text.sampling import SamplingParams
from hybrid.text.token_rules import TokenRules

_LARGEST = sys.float_info.max
# What transformers takes for the values that a file with sampling leaves out.
_LEFT_OUT = SamplingParams(temperature=1.0, top_k=50, top_p=1.0)

# Fields of transformers that change the text, and that hybrid does not follow unless they have
# this value, which changes nothing.
_NEUTRAL: dict[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "constraints": None,
    "force_words_ids": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "token_healing": False,
    "max_time": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What holds for an answer wherever the caller of `Engine.generate` says nothing."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    gives_sampling: bool = False  # whether `sampling` is the model's, not hybrid's own
    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and answer; void if there is max_new_tokens
    stop: tuple[str, ...] = ()
    rules: TokenRules = field(default_factory=TokenRules)
    notices: tuple[str, ...] = ()  # one line each: what is not followed

    @property
    def limits_answers(self) -> bool:
        """Whether the model itself says how long an answer may be."""
        return self.max_new_tokens is not None or self.max_length is not None

    def max_answer(self, n_prompt: int, default: int) -> int:
        """Return how many tokens may follow a prompt of `n_prompt`; `default` if nothing says it.

        The result may be 0 or less: a prompt of at least `max_length` tokens leaves no room.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return default if self.max_length is None else self.max_length - n_prompt


def read_generation_defaults(folder: Path, vocab_size: int) -> GenerationDefaults:
    """Read generation_config.json, if the folder has it.

    Raises InvalidCheckpoint if the file is not a JSON object. NaN and Infinity are values that make
    no sense.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    fields = _Fields(read_object(path, keeps_constants=True))
    sampling, gives_sampling = _read_sampling(fields)
    stop = fields.get("stop_strings", _are_strings, "one text or several, none of them empty")
    defaults = GenerationDefaults(
        sampling=sampling,
        gives_sampling=gives_sampling,
        max_new_tokens=fields.get("max_new_tokens", _is_positive, "an integer, 1 or more"),
        max_length=fields.get("max_length", _is_positive, "an integer, 1 or more"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        rules=_read_rules(fields, vocab_size),
    )
    eos = fields.values.get("eos_token_id")
    for token in [] if eos is None else eos if _is_list(eos) else [eos]:
        if not known_token_ids(token, vocab_size):
            fields.remark(
                f"eos_token_id {reprlib.repr(token)} is ignored: the ids end at {vocab_size - 1}"
            )
    fields.name_what_is_not_followed()
    if not fields.remarks:
        return defaults
    notice = f"{model_name(folder)}: generation_config.json: {'; '.join(fields.remarks)}"
    return replace(defaults, notices=(notice,))


class _Fields:
    """The file's fields, and remarks on those that are not followed."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def get(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        """Return a field's value, or None if it is absent, null or, with a remark, invalid."""
        value = self.values.get(name)
        if value is None or is_valid(value):
            return value
        self.remark(f"{name} {reprlib.repr(value)} is ignored: expected {expected}")
        return None

    def name_what_is_not_followed(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = self.values.get(name)
            if value is not None and value != neutral:
                self.remark(f"{name} {reprlib.repr(value)} is not followed")


def _read_sampling(fields: _Fields) -> tuple[SamplingParams, bool]:
    """Return the sampling parameters, and whether the file gives any."""
    does_sample = fields.get("do_sample", lambda value: isinstance(value, bool), "true or false")
    given = {
        "temperature": fields.get("temperature", _is_number(0, _LARGEST), "a number, 0 or more"),
        "top_k": fields.get("top_k", _is_int, "an integer"),
        "top_p": fields.get("top_p", _is_number(0, _LARGEST), "a number from 0 to 1"),
        "min_p": fields.get("min_p", _is_number(0, 1), "a number from 0 to 1"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    penalty = fields.get("repetition_penalty", _is_number(0.1, 10), "a number from 0.1 to 10")
    if given.get("top_k", 0) < 0:
        fields.remark(f"top_k {given['top_k']} is taken as 0, all tokens")
        given["top_k"] = 0
    if given.get("top_p", 1) > 1:
        fields.remark(f"top_p {given['top_p']} is taken as 1, all tokens")
        given["top_p"] = 1
    is_sampling = does_sample is True or (does_sample is None and bool(given))
    params = replace(_LEFT_OUT if is_sampling else SamplingParams(), **given)
    if does_sample is False:
        params = replace(params, temperature=0.0)
    if penalty is not None:
        params = replace(params, repeat_penalty=penalty)
    return params, does_sample is not None or bool(given) or penalty is not None


def _read_rules(fields: _Fields, vocab_size: int) -> TokenRules:
    def suppressed(name: str) -> tuple[int, ...]:
        # As in transformers, an id that the model lacks changes nothing.
        return known_token_ids(fields.get(name, _is_list, "a list of ids"), vocab_size)

    def count(name: str) -> int:
        return fields.get(name, _is_count, "an integer, 0 or more") or 0

    bad_words = []
    for sequence in fields.get("bad_words_ids", _is_list, "a list of lists of ids") or ():
        ids = known_token_ids(sequence, vocab_size)
        if _is_list(sequence) and len(ids) == len(sequence) > 0:
            bad_words.append(ids)
        else:
            fields.remark(f"{reprlib.repr(sequence)} of bad_words_ids is ignored: expected ids")
    return TokenRules(
        no_repeat_ngram_size=count("no_repeat_ngram_size"),
        bad_words_ids=tuple(bad_words),
        suppress_tokens=suppressed("suppress_tokens"),
        begin_suppress_tokens=suppressed("begin_suppress_tokens"),
        min_length=count("min_length"),
        min_new_tokens=count("min_new_tokens"),
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_number(least: float, most: float) -> Callable[[Any], bool]:
    """Return a test for numbers from `least` to `most`, which NaN and infinity fail."""
    return lambda value: (_is_int(value) or isinstance(value, float)) and least <= value <= most


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _are_strings(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return _is_list(strings) and all(map(is_text, strings))
