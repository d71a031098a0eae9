"""Options are said once: the keywords of the API are the fields of two classes."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

import hybrid
from hybrid import GenerationOptions, InvalidOption, LoadOptions
from hybrid.engine.options import GenerationKeywords, LoadKeywords
from hybrid.text.generation_config import GenerationDefaults
from hybrid.text.sampling import Sampler, SamplingParams
from hybrid.text.token_rules import TokenRules


@pytest.mark.parametrize(
    ("options", "keywords"), [(LoadOptions, LoadKeywords), (GenerationOptions, GenerationKeywords)]
)
def test_type_checkers_see_the_fields(options, keywords):
    assert {field.name: field.type for field in fields(options)} == {
        name: reference.__forward_arg__ for name, reference in keywords.__annotations__.items()
    }


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (hybrid.load, LoadOptions),
        (hybrid.Engine.generate, GenerationOptions),
        (hybrid.Engine.chat, GenerationOptions),
    ],
)
def test_help_lists_the_fields_with_their_defaults(function, options):
    parameters = inspect.signature(function).parameters
    for field in fields(options):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


def test_keywords_change_what_options_say():
    options = GenerationOptions(max_tokens=5, seed=3)
    with hybrid.load("stories", options=LoadOptions(threads=1), quant="bf16") as engine:
        assert (engine.n_threads, engine.quant) == (1, "bf16")
        first = engine.generate("Once", options=options)
        second = engine.generate("Once", options=options, max_tokens=3)
        assert len("".join(first)) > len("".join(second))
        assert first.seed == second.seed == 3
        assert second.tokens == first.tokens[:3]
    with pytest.raises(FrozenInstanceError):
        options.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoadOptions(threads=0), "threads: expected an integer from 1"),
        (lambda: LoadOptions(quant="q3"), "quant: expected one of bf16, f16, q8, q4, found 'q3'"),
        (lambda: LoadOptions(recall=1.0), "recall: expected a value between 0 and 1"),
        (lambda: LoadOptions(device="tpu"), "device: expected one of auto, cpu, cuda"),
        (lambda: LoadOptions(vram_budget=-1), "vram_budget: expected an integer, 0 or more"),
        (lambda: LoadOptions(device="cpu", vram_budget=1), "device cpu takes no plan"),
        (lambda: LoadOptions(add_bos="no"), "add_bos: expected None, True or False, found 'no'"),
        (lambda: GenerationOptions(max_tokens=0), "max_tokens: expected an integer, 1 or more"),
        (lambda: GenerationOptions(temperature=-1), "temperature"),
        (lambda: GenerationOptions(stop=[""]), "stop: expected non-empty strings"),
        (lambda: GenerationOptions(logprobs=101), "logprobs: expected an integer from 0 to 100"),
        (lambda: GenerationOptions(seed=-2), "seed"),
        (lambda: GenerationOptions(presence_penalty=2.5), "presence_penalty"),
        (lambda: GenerationOptions(logit_bias=[1]), "logit_bias: expected a mapping"),
        (lambda: GenerationOptions(logit_bias={"1": 2}), "logit_bias"),
    ],
)
def test_a_value_that_no_model_allows_is_refused_at_once(call, message):
    with pytest.raises(InvalidOption, match=message):
        call()


def test_what_is_not_given_is_the_models():
    defaults = SamplingParams(temperature=0.3, top_k=7, top_p=0.5, min_p=0.1, repeat_penalty=1.3)
    assert GenerationOptions().sampling(defaults) == defaults
    changed = GenerationOptions(temperature=0.0, seed=1, repeat_penalty=1.2).sampling(defaults)
    assert changed == SamplingParams(
        temperature=0.0, top_k=7, top_p=0.5, min_p=0.1, repeat_penalty=1.2, seed=1
    )


def test_limits_are_the_callers_then_the_models_then_hybrids():
    rules = TokenRules(no_repeat_ngram_size=3)
    model = GenerationDefaults(max_new_tokens=9, stop=("END",), rules=rules)
    assert GenerationOptions().limits(model, 5) == (9, ("END",), rules, True)
    assert GenerationOptions(max_tokens=3, stop="x").limits(model, 5) == (3, ("x",), rules, False)
    assert GenerationOptions(max_tokens=None, stop=()).limits(model, 5) == (None, (), rules, False)
    assert GenerationOptions().limits(GenerationDefaults(), 5) == (256, (), TokenRules(), False)


@pytest.mark.parametrize("seed", [None, -1])
def test_a_random_seed_differs_each_time(seed):
    params = GenerationOptions(seed=seed).sampling(SamplingParams())
    seeds = {Sampler(params).seed for _ in range(5)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


@pytest.mark.parametrize("name", ["treads", "max_token"])
def test_a_mistyped_option_is_an_error(name):
    with pytest.raises(TypeError, match=name):
        hybrid.load("stories", **{name: 1})
