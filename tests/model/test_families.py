"""config.json of every family is parsed exactly; unsupported and broken ones are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import HybridError, InvalidCheckpoint, UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors, parse_config

PATH = Path("some model/config.json")
MINICPM_S_1B = Path(__file__).parents[2] / "../shared/data/tokenizers/MiniCPM-S-1B-sft/config.json"
ABSENT = object()


def parse(config: dict[str, Any], **changes: Any) -> ModelConfig:
    merged = {**config, **changes}
    return parse_config({key: v for key, v in merged.items() if v is not ABSENT}, PATH)


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "relu"}


def test_every_number_of_a_minicpm_config_is_parsed(config: dict[str, Any]) -> None:
    assert parse(config) == ModelConfig(
        family="minicpm",
        vocab_size=10,
        hidden_size=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        n_neurons=48,
        max_context=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        activation="fatrelu",
        threshold=0.03,
        embedding_scale=12.0,
        residual_scale=1.4 / math.sqrt(2),
        logit_scale=0.5,
        has_tied_head=True,
        bos_id=1,
        eos_ids=(2,),
    )


@pytest.mark.skipif(
    not MINICPM_S_1B.is_file(), reason="the real MiniCPM-S-1B config.json is not on this machine"
)
def test_the_real_minicpm_s_1b_config_is_parsed() -> None:
    config = parse_config(json.loads(MINICPM_S_1B.read_text()), MINICPM_S_1B)
    assert config == ModelConfig(
        family="minicpm",
        vocab_size=73440,
        hidden_size=1536,
        n_layers=52,
        n_heads=24,
        n_kv_heads=8,
        head_dim=64,
        n_neurons=3840,
        max_context=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        activation="fatrelu",
        threshold=0.03,
        embedding_scale=12.0,
        residual_scale=1.4 / math.sqrt(52),
        logit_scale=256 / 1536,
        has_tied_head=True,
        bos_id=1,
        eos_ids=(2,),
    )
    n_parameters = sum(math.prod(tensor.shape) for tensor in expected_tensors(config))
    assert n_parameters == 1_360_246_272


def test_llama_has_no_scales_and_no_tied_head(config: dict[str, Any]) -> None:
    for architecture in ("LlamaForCausalLM", "SparseLlamaForCausalLM"):
        llama = parse(config, architectures=[architecture])
        assert llama.family == "llama"
        assert (llama.embedding_scale, llama.residual_scale, llama.logit_scale) == (1.0, 1.0, 1.0)
        assert not llama.has_tied_head


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": ABSENT}, {"n_kv_heads": 4}),
        ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"num_attention_heads": 6, "head_dim": 16}, {"n_heads": 6, "head_dim": 16}),
        ({"num_attention_heads": 2, "head_dim": 10}, {"n_heads": 2, "head_dim": 10}),
        ({"hidden_size": 40}, {"hidden_size": 40, "head_dim": 10}),
        ({"hidden_size": 8}, {"hidden_size": 8, "head_dim": 2}),
        ({"hidden_act": "relu"}, {"activation": "relu", "threshold": 0.0}),
        ({"hidden_act": "silu"}, {"activation": "silu", "threshold": 0.0}),
        ({"hidden_act_param": 0}, {"activation": "fatrelu", "threshold": 0.0}),
        ({"tie_word_embeddings": False}, {"has_tied_head": False}),
        ({**LLAMA, "tie_word_embeddings": True}, {"has_tied_head": True}),
        ({"scale_emb": ABSENT}, {"embedding_scale": 1.0}),
        ({"scale_depth": ABSENT}, {"residual_scale": 1 / math.sqrt(2)}),
        ({"dim_model_base": ABSENT}, {"logit_scale": 1 / 32}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "default"}}, {"rope_theta": 1e4}),
        (
            {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
            {"rope_theta": 2e4},
        ),
        ({"eos_token_id": [2, 9]}, {"eos_ids": (2, 9)}),
        ({"eos_token_id": None}, {"eos_ids": ()}),
        ({"eos_token_id": ABSENT}, {"eos_ids": (2,)}),
        ({"bos_token_id": None}, {"bos_id": None}),
        ({"num_experts": 0, "attention_bias": False, "sliding_window": None}, {}),
    ],
)
def test_supported_variants_are_parsed(
    config: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    parsed = parse(config, **changes)
    assert {key: getattr(parsed, key) for key in expected} == expected


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
NOT_SIZES = (0, -32, 32.0, 32.5, "32", True, [32], 2**31, 10**400, math.nan, math.inf)
NOT_NUMBERS = (0, -1.0, math.nan, math.inf, "1", True, [1.0], 10**400)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: repr(value)[:8])
def test_bad_sizes_are_refused(config: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"some model/config.json: {key} is "):
        parse(config, **{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "scale_emb", "scale_depth"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:8])
def test_bad_numbers_are_refused(config: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"config.json: {key} is "):
        parse(config, **{key: value})


@pytest.mark.parametrize(
    "key", [*(key for key in SIZES if key != "num_key_value_heads"), "rms_norm_eps"]
)
def test_missing_keys_without_a_default_are_refused(config: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"has no {key}"):
        parse(config, **{key: ABSENT})


@pytest.mark.parametrize(
    "threshold", [ABSENT, None, -0.01, math.nan, math.inf, "0.03", True], ids=repr
)
def test_fatrelu_without_a_threshold_is_refused(config: dict[str, Any], threshold: object) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"hidden_act_param is .*; expected fatrelu's"):
        parse(config, hidden_act_param=threshold)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ABSENT}, InvalidCheckpoint, "architectures is None"),
        ({"architectures": []}, InvalidCheckpoint, "architectures is"),
        ({"architectures": "LlamaForCausalLM"}, InvalidCheckpoint, "architectures is"),
        ({"architectures": [["LlamaForCausalLM"]]}, InvalidCheckpoint, "architectures is"),
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, "'GPT2LMHeadModel' is unknown"),
        ({"architectures": ["MiniCPM3ForCausalLM"]}, UnsupportedModel, "'MiniCPM3ForCausalLM'"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act 'gelu' is unknown"),
        ({"hidden_act": ABSENT}, UnsupportedModel, "hidden_act None"),
        ({"hidden_act": ["relu"]}, UnsupportedModel, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantization_config is set"),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias is set"),
        ({"mlp_bias": True}, UnsupportedModel, "mlp_bias is set"),
        ({"num_experts": 8}, UnsupportedModel, "num_experts is set"),
        ({"num_local_experts": 8}, UnsupportedModel, "num_local_experts is set"),
        ({"sliding_window": 4096}, UnsupportedModel, "sliding_window is set"),
        ({**LLAMA, "sliding_window": 4096}, UnsupportedModel, "sliding_window is set"),
        ({"num_key_value_heads": 3}, InvalidCheckpoint, "num_key_value_heads is 3"),
        ({"num_key_value_heads": 8}, InvalidCheckpoint, "num_key_value_heads is 8"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, InvalidCheckpoint, "heads is 5"),
        ({"num_attention_heads": 64, "num_key_value_heads": 1}, InvalidCheckpoint, "heads is 64"),
        ({"head_dim": 7}, UnsupportedModel, "7 dimensions; expected an even number"),
        ({"head_dim": 0}, InvalidCheckpoint, "head_dim is 0"),
        ({"head_dim": 2**30}, InvalidCheckpoint, "num_attention_heads is 4"),
        ({"eos_token_id": 10}, InvalidCheckpoint, "eos_token_id is 10; expected ids from 0 to 9"),
        ({"eos_token_id": [2, -1]}, InvalidCheckpoint, "eos_token_id"),
        ({"eos_token_id": "2"}, InvalidCheckpoint, "eos_token_id"),
        ({"eos_token_id": True}, InvalidCheckpoint, "eos_token_id"),
        ({"bos_token_id": 10}, InvalidCheckpoint, "bos_token_id is 10"),
        ({"tie_word_embeddings": "yes"}, InvalidCheckpoint, "tie_word_embeddings is 'yes'"),
        ({"dim_model_base": 0}, InvalidCheckpoint, "dim_model_base is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedModel, "linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModel, "longrope"),
        ({"rope_scaling": "linear"}, InvalidCheckpoint, "rope_scaling is 'linear'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}},
            UnsupportedModel,
            "llama3",
        ),
        (
            {
                "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
                "rope_scaling": {"type": "yarn"},
            },
            UnsupportedModel,
            "yarn",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            UnsupportedModel,
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {}}}, InvalidCheckpoint, "has no rope_theta"),
    ],
)
def test_unsupported_and_broken_configs_are_refused(
    config: dict[str, Any], changes: dict[str, Any], error: type[HybridError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        parse(config, **changes)
    assert str(raised.value).startswith(str(PATH))


def test_a_message_stays_short(config: dict[str, Any]) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, deep):
        with pytest.raises(InvalidCheckpoint) as raised:
            parse(config, hidden_size=value)
        assert len(str(raised.value)) < 300
