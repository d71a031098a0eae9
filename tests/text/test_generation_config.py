"""generation_config.json decides what the caller leaves open, as its authors meant it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_model

import hybrid
from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text.generation_config import GenerationDefaults, read_generation_defaults
from hybrid.text.sampling import Sampler, SamplingParams
from hybrid.text.token_rules import TokenRules

VOCAB = 4096


def read(folder: Path, values: object) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation_defaults(folder, VOCAB)


def test_without_a_file_the_defaults_are_hybrids(tmp_path: Path) -> None:
    defaults = read_generation_defaults(tmp_path, VOCAB)
    assert defaults == GenerationDefaults()
    assert defaults.sampling == SamplingParams()
    assert not defaults.gives_sampling
    assert defaults.max_answer(7, 256) == 256


@pytest.mark.parametrize("values", [{}, {"eos_token_id": 2}, {"temperature": None, "top_k": None}])
def test_a_file_that_says_nothing_about_sampling_changes_nothing(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    assert read(tmp_path, values) == GenerationDefaults()


def test_every_usual_field_is_read(tmp_path: Path) -> None:
    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "max_length": 4096,
        "stop_strings": ["\n\n", "User:"],
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [8, 9]],
        "suppress_tokens": [4, 99999],
        "begin_suppress_tokens": [5],
        "min_length": 10,
        "min_new_tokens": 2,
        "eos_token_id": [2, 7],
        "pad_token_id": 4096,
        "transformers_version": "5.0.0",
        "chat_format": "of another program",
    }
    assert read(tmp_path, values) == GenerationDefaults(
        sampling=SamplingParams(
            temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repeat_penalty=1.05
        ),
        gives_sampling=True,
        max_new_tokens=2048,
        max_length=4096,
        stop=("\n\n", "User:"),
        rules=TokenRules(
            no_repeat_ngram_size=3,
            bad_words_ids=((7,), (8, 9)),
            suppress_tokens=(4,),
            begin_suppress_tokens=(5,),
            min_length=10,
            min_new_tokens=2,
        ),
    )
    assert read(tmp_path, {"stop_strings": "END"}).stop == ("END",)


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True},
        {"do_sample": True, "top_p": 0.8, "temperature": 0.8},
        {"do_sample": True, "top_k": 0, "min_p": 0.1},
        {"do_sample": True, "repetition_penalty": 1.2},
    ],
)
def test_what_a_sampling_file_leaves_out_is_as_in_transformers(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    sampling = read(tmp_path, values).sampling
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    assert sampling == SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p or 0.0,
        repeat_penalty=config.repetition_penalty,
    )


def test_a_file_without_sampling_is_greedy_but_keeps_its_penalty(tmp_path: Path) -> None:
    defaults = read(tmp_path, {"do_sample": False, "repetition_penalty": 1.1})
    assert defaults.sampling.temperature == 0
    assert defaults.sampling.repeat_penalty == 1.1
    assert defaults.gives_sampling


def test_sampling_values_alone_mean_sampling(tmp_path: Path) -> None:
    assert read(tmp_path, {"top_p": 0.9}).sampling == SamplingParams(
        temperature=1.0, top_k=50, top_p=0.9
    )
    # A penalty applies to greedy answers too, so it does not say how tokens are drawn.
    penalty = read(tmp_path, {"repetition_penalty": 1.1})
    assert penalty.sampling == SamplingParams(repeat_penalty=1.1)


@pytest.mark.parametrize(
    ("values", "expected", "notice"),
    [
        ({"top_k": -1}, {"top_k": 0}, "top_k -1 is taken as 0, all tokens"),
        ({"top_p": 0.0}, {"top_p": 0.0}, None),
        ({"top_p": 1.5}, {"top_p": 1}, "top_p 1.5 is taken as 1, all tokens"),
        ({"top_p": -0.1}, {}, "top_p -0.1 is ignored: expected a number from 0 to 1"),
        ({"min_p": 2}, {}, "min_p 2 is ignored: expected a number from 0 to 1"),
        ({"temperature": 0.0}, {"temperature": 0.0}, None),
        ({"temperature": "hot"}, {}, "temperature 'hot' is ignored"),
        ({"temperature": 10**400}, {}, "temperature 1000"),
        ({"temperature": True}, {}, "temperature True is ignored"),
        ({"top_k": 2.5}, {}, "top_k 2.5 is ignored: expected an integer"),
        ({"repetition_penalty": 0}, {}, "repetition_penalty 0 is ignored"),
        ({"repetition_penalty": -1.5}, {}, "repetition_penalty -1.5 is ignored"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens 0 is ignored: expected an integer, 1 or more"),
        ({"max_length": "long"}, {}, "max_length 'long' is ignored"),
        ({"stop_strings": [""]}, {}, "stop_strings [''] is ignored"),
        ({"stop_strings": {"a": 1}}, {}, "stop_strings {'a': 1} is ignored"),
        ({"no_repeat_ngram_size": -1}, {}, "no_repeat_ngram_size -1 is ignored"),
        ({"suppress_tokens": 3}, {}, "suppress_tokens 3 is ignored: expected a list of ids"),
        ({"bad_words_ids": [[4096]]}, {}, "[4096] of bad_words_ids is ignored"),
        ({"bad_words_ids": [[]]}, {}, "[] of bad_words_ids is ignored"),
        ({"bad_words_ids": [5]}, {}, "5 of bad_words_ids is ignored"),
        ({"eos_token_id": 4096}, {}, "eos_token_id 4096 is ignored: the ids end at 4095"),
        ({"eos_token_id": [2, -1]}, {}, "eos_token_id -1 is ignored"),
        ({"eos_token_id": "</s>"}, {}, "eos_token_id '</s>' is ignored"),
        ({"num_beams": 4}, {}, "num_beams 4 is not followed"),
        ({"typical_p": 0.9}, {}, "typical_p 0.9 is not followed"),
        ({"forced_eos_token_id": 2}, {}, "forced_eos_token_id 2 is not followed"),
        ({"encoder_repetition_penalty": 1.3}, {}, "encoder_repetition_penalty 1.3 is not followed"),
        ({"encoder_no_repeat_ngram_size": 3}, {}, "encoder_no_repeat_ngram_size 3 is not followed"),
        ({"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}, {}, None),
        ({"num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0}, {}, None),
        ({"temperature": math.nan}, {}, "temperature nan is ignored: expected a number"),
        ({"top_p": math.inf}, {}, "top_p inf is ignored: expected a number from 0 to 1"),
        ({"top_k": -math.inf}, {}, "top_k -inf is ignored: expected an integer"),
        ({"repetition_penalty": math.nan}, {}, "repetition_penalty nan is ignored"),
        ({"max_new_tokens": math.inf}, {}, "max_new_tokens inf is ignored"),
        ({"typical_p": math.nan}, {}, "typical_p nan is not followed"),
        ({"eos_token_id": [2, math.nan]}, {}, "eos_token_id nan is ignored"),
        ({"stop_strings": ["\ud800"]}, {}, r"stop_strings ['\ud800'] is ignored"),
    ],
)
def test_odd_values_do_not_stop_the_load(
    tmp_path: Path, values: dict[str, Any], expected: dict[str, Any], notice: str | None
) -> None:
    defaults = read(tmp_path, {"do_sample": True} | values)
    whole = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | expected
    assert defaults.sampling == SamplingParams(**whole)
    assert len(defaults.notices) == (notice is not None)
    if notice is not None:
        assert notice in defaults.notices[0]
        assert "generation_config.json" in defaults.notices[0]


def test_do_sample_of_another_type_is_ignored(tmp_path: Path) -> None:
    (notice,) = read(tmp_path, {"do_sample": "yes"}).notices
    assert "do_sample 'yes' is ignored: expected true or false" in notice


def test_all_remarks_are_one_line(tmp_path: Path) -> None:
    (notice,) = read(tmp_path, {"top_k": -1, "num_beams": 4, "top_h": 0.4}).notices
    assert notice.count(";") == 2
    assert "\n" not in notice


def test_a_model_with_numbers_that_json_lacks_is_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=VOCAB)
    values = {"temperature": math.nan, "top_p": math.inf, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(values))
    with hybrid.load(folder) as engine:
        assert engine.config.eos_ids == (7,)
        (notice,) = [line for line in engine.notices if "generation_config.json" in line]
        assert "temperature nan is ignored" in notice
        assert "top_p inf is ignored" in notice


# Fields that change no text: names, sizes of caches, what is returned, and how answers are found
# that are the same.
WITHOUT_EFFECT = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
}
# They say how beams are compared, so they have no effect without num_beams, which is named.
OF_BEAMS = {"diversity_penalty", "early_stopping", "length_penalty"}


def test_every_field_of_transformers_is_applied_or_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    for name in sorted(vars(transformers.GenerationConfig()).keys() - WITHOUT_EFFECT - OF_BEAMS):
        # No field expects such an object, so it is either ignored or not followed.
        (notice,) = read(tmp_path, {name: {"odd": 1}}).notices
        assert name in notice


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json: "):
        read_generation_defaults(tmp_path, VOCAB)


FIELDS = ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
FIELDS += ["max_new_tokens", "max_length", "stop_strings", "eos_token_id", "bad_words_ids"]
FIELDS += ["no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "min_length"]
FIELDS += ["min_new_tokens", "num_beams", "typical_p", "sequence_bias", "constraints"]
SCALARS = st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.text(max_size=3)
SCALARS |= st.floats() | st.sampled_from([0.0, 0.5, 1.0, 1e300])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES))
@settings(max_examples=100)
def test_any_values_give_defaults_that_work(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any values"
    folder.mkdir(exist_ok=True)
    defaults = read(folder, values)
    banned = defaults.rules.banned([1, 2, 1], [2], (2, 7))
    assert all(0 <= token < VOCAB for token in banned)
    token = Sampler(defaults.sampling).sample(np.zeros(VOCAB, np.float32), {1, 2}, banned)
    assert token not in banned
    assert all(defaults.stop)
    assert isinstance(defaults.max_answer(3, 256), int)
    assert len(defaults.notices) <= 1


# In use


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB, eos_token_id=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": []}))
    return folder


def answer(folder: Path, values: dict[str, Any], **options: Any) -> hybrid.Generation:
    """Answer with a model whose generation_config.json has these values."""
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False} | values))
    with hybrid.load(folder, threads=1) as engine:
        generation = engine.generate([1, 400, 401, 402], **options)
        "".join(generation)
    return generation


def test_the_models_limit_holds_unless_the_caller_gives_one(folder: Path) -> None:
    assert len(answer(folder, {"max_new_tokens": 5}).tokens) == 5
    assert len(answer(folder, {"max_new_tokens": 5}, max_tokens=3).tokens) == 3
    assert len(answer(folder, {"max_new_tokens": 5, "max_length": 7}).tokens) == 5
    assert len(answer(folder, {"max_length": 7}).tokens) == 3  # the prompt has 4
    with pytest.raises(InvalidOption, match=r"prompt has 4 tokens, .* allows 4 for prompt and"):
        answer(folder, {"max_length": 4})
    assert len(answer(folder, {"max_length": 4}, max_tokens=2).tokens) == 2


def test_without_a_limit_an_answer_fills_the_context(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    with hybrid.load(folder, threads=1, context_size=300) as engine:
        ended = engine.generate([1, 400], temperature=0, max_tokens=None)
        "".join(ended)
        assert ended.context_is_full
        assert len(ended.tokens) == 300 - 2 + 1
        limited = engine.generate([1, 400], temperature=0)
        "".join(limited)
        assert len(limited.tokens) == 256


def test_the_models_penalty_covers_prompt_and_answer(folder: Path) -> None:
    plain = answer(folder, {}, max_tokens=100).tokens
    assert len(set(plain)) < 100  # greedy answers of random weights loop
    penalised = answer(folder, {"repetition_penalty": 10.0}, max_tokens=100).tokens
    # A penalty of 10 leaves no repetition at any distance: no window of recent tokens forgets.
    assert len(set(penalised) | {1, 400, 401, 402}) == 104
    off = answer(folder, {"repetition_penalty": 10.0}, max_tokens=100, repeat_penalty=1.0).tokens
    assert off == plain


def test_the_models_stop_strings_end_an_answer(folder: Path) -> None:
    whole = answer(folder, {}, max_tokens=40)
    word = whole.text[10:14]
    stopped = answer(folder, {"stop_strings": [word]}, max_tokens=40)
    assert stopped.text == whole.text[: whole.text.index(word)]
    assert stopped.finish_reason == "stop"
    assert answer(folder, {"stop_strings": [word]}, max_tokens=40, stop=()).text == whole.text


def test_the_models_rules_ban_tokens(folder: Path) -> None:
    base = {"repetition_penalty": 10.0}  # no token occurs twice
    plain = answer(folder, base, max_tokens=20).tokens
    first, second = plain[:2]
    suppressed = answer(folder, base | {"suppress_tokens": [second]}, max_tokens=20).tokens
    assert suppressed[0] == first
    assert second not in suppressed
    begun = answer(folder, base | {"begin_suppress_tokens": [first, second]}, max_tokens=20).tokens
    assert begun[0] not in (first, second)
    without = answer(folder, base | {"bad_words_ids": [[first, second]]}, max_tokens=20).tokens
    assert without[0] == first
    assert without[1] != second
    loop = answer(folder, {}, max_tokens=60).tokens
    assert len(set(pairwise(loop))) < 59
    unique = answer(folder, {"no_repeat_ngram_size": 2}, max_tokens=60).tokens
    assert len(set(pairwise(unique))) == 59


def test_every_end_token_of_the_model_ends_an_answer(folder: Path) -> None:
    base = {"repetition_penalty": 10.0}  # no token occurs twice
    plain = answer(folder, base, max_tokens=10).tokens
    for end in (3, 5):
        ends = base | {"eos_token_id": [99999, plain[end], plain[5]]}
        ended = answer(folder, ends, max_tokens=10)
        assert ended.tokens == plain[:end]
        assert ended.finish_reason == "stop"
        later = answer(folder, ends | {"min_new_tokens": 7}, max_tokens=10).tokens
        assert len(later) >= 7
