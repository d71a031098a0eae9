"""config.json of every family is parsed exactly; unsupported and broken ones are refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import HybridError, InvalidCheckpoint, UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors, llama, parse_config
from hybrid.notices import Notices

PATH = Path("some model/config.json")
MINICPM_S_1B = Path(__file__).parents[2] / "../shared/data/tokenizers/MiniCPM-S-1B-sft/config.json"
ABSENT = object()


def parse(config: dict[str, Any], notices: Notices | None = None, **changes: Any) -> ModelConfig:
    merged = {**config, **changes}
    return parse_config({key: v for key, v in merged.items() if v is not ABSENT}, PATH, notices)


def notices_of(config: dict[str, Any], **changes: Any) -> list[str]:
    notices = Notices()
    parse(config, notices, **changes)
    return list(notices)


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "relu"}
SPARSE_LLAMA = {"architectures": ["SparseLlamaForCausalLM"]}


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
    notices = Notices()
    config = parse_config(json.loads(MINICPM_S_1B.read_text()), MINICPM_S_1B, notices)
    assert not list(notices)
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
        ({"sliding_window": 32768, "use_sliding_window": False}, {}),  # as Qwen writes it
        ({"layer_types": ["full_attention"] * 2, "rope_interleaved": False}, {}),
        ({"sparsity_config": {"format": "dense"}, "logits_scaling": 1.0}, {}),
        ({**LLAMA, "model_type": "llama"}, {"family": "llama"}),
        ({**SPARSE_LLAMA, "model_type": "sparsellama"}, {"family": "llama"}),
        # Folded into the weights, and still listed. The classes are transformers' own.
        (
            {**LLAMA, "auto_map": {"AutoModel": "LlamaModel"}, "scale_emb": 12, "scale_depth": 1.4},
            {"embedding_scale": 1.0},
        ),
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


@pytest.mark.parametrize("key", [*SIZES[:4], "intermediate_size"])
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
        ({**SPARSE_LLAMA, "hidden_act": ABSENT}, UnsupportedModel, "hidden_act None"),
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
        ({"eos_token_id": [2, 2.0]}, InvalidCheckpoint, "expected ids from 0 to 9"),
        ({"eos_token_id": "2"}, InvalidCheckpoint, "eos_token_id"),
        ({"eos_token_id": True}, InvalidCheckpoint, "eos_token_id"),
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
        ({"rope_parameters": {"full_attention": {}}}, UnsupportedModel, "the same in all layers"),
        ({"rope_scaling": {"rope_type": None, "type": "linear"}}, UnsupportedModel, "linear"),
        ({"rope_scaling": {"rope_theta": -1.0}}, InvalidCheckpoint, "rope_theta is -1"),
        # Models that look like a family and compute something else.
        (
            {**LLAMA, "layer_types": ["full_attention", "sliding_attention"]},
            UnsupportedModel,
            "layer_types has 'sliding_attention'",
        ),
        ({**LLAMA, "layer_types": "full_attention"}, InvalidCheckpoint, "layer_types is 'full"),
        ({**LLAMA, "sliding_windows": [64, 64]}, UnsupportedModel, "sliding_windows is set"),
        ({**LLAMA, "attention_chunk_size": 8192}, UnsupportedModel, "attention in chunks"),
        ({**LLAMA, "no_rope_layers": [1, 0]}, UnsupportedModel, "layers without positions"),
        ({**LLAMA, "rope_interleaved": True}, UnsupportedModel, "neighbouring dimensions"),
        ({**LLAMA, "use_qk_norm": True}, UnsupportedModel, "norms of queries and keys"),
        ({**LLAMA, "final_logit_softcapping": 30.0}, UnsupportedModel, "limits on logits"),
        ({**LLAMA, "logits_scaling": 8.0}, UnsupportedModel, r"logits_scaling is set \(8\.0\)"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, UnsupportedModel, "a part of each head"),
        ({**LLAMA, "kv_lora_rank": 256}, UnsupportedModel, "latent attention"),
        ({**LLAMA, "is_causal": False}, UnsupportedModel, "is_causal is false"),
        ({**LLAMA, "model_type": "qwen2"}, UnsupportedModel, "model_type is 'qwen2', not 'llama'"),
        (  # SparseLM's: SiLU is written, ReLU is computed
            {**SPARSE_LLAMA, "model_type": "llama_sparse_relu", "hidden_act": "silu"},
            UnsupportedModel,
            "model_type is 'llama_sparse_relu', not 'sparsellama'",
        ),
        ({**SPARSE_LLAMA, "model_type": "llama"}, UnsupportedModel, "model_type is 'llama'"),
        ({"sparse_config": {"topk": 64}}, UnsupportedModel, "sparse attention"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            UnsupportedModel,
            "quantised by 'gptq'",
        ),
        (
            {"quantization_config": {"bnb_4bit_quant_type": "nf4"}},
            UnsupportedModel,
            "quantised by 'bitsandbytes'",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, UnsupportedModel, "quantised by MLX"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, UnsupportedModel, "compressed"),
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
            parse(config, hidden_size=value, auto_map={"AutoModel": value})
        assert len(str(raised.value)) < 300
    for key in ("layer_types", "rope_scaling", "quantization_config"):
        value = [deep] * 100 if key == "layer_types" else {"type": deep, "quant_method": deep}
        with pytest.raises(UnsupportedModel) as refused:
            parse(config, **LLAMA, **{key: value})
        assert len(str(refused.value)) < 300


def test_a_long_architecture_name_is_shown_whole(config: dict[str, Any]) -> None:
    name = "Qwen2_5_VLOmniMoeTextToSpeechForConditionalGeneration"
    with pytest.raises(UnsupportedModel, match=f"architecture '{name}' is unknown"):
        parse(config, architectures=[name])
    with pytest.raises(UnsupportedModel) as raised:
        parse(config, architectures=["X" * 10**6])
    assert len(str(raised.value)) < 300


# What transformers accepts is accepted, and said


ROPE = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": None},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {"type": "default", "rope_theta": 7e5}},
    {"rope_theta": 3e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 3e4, "rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    {"rope_theta": 3e4, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 3e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {}},
    {"rope_theta": 3e4, "rope_parameters": None},
    {
        "rope_theta": 3e4,
        "rope_scaling": {},
        "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
    },
    {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
    },
    {
        "rope_theta": 3e4,
        "rope_scaling": {"rope_type": "default", "rope_theta": 4e4},
        "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
    },
    {
        "rope_scaling": {"rope_type": "default", "rope_theta": 4e4},
        "rope_parameters": {"rope_theta": 2e4, "rope_type": "yarn", "factor": 4.0},
    },
    {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 8.0}},
]


@pytest.mark.parametrize("rope", ROPE, ids=str)
def test_theta_has_the_precedence_of_transformers(
    config: dict[str, Any], rope: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    theirs = {key: value for key, value in copy.deepcopy(rope).items() if value is not None}
    for own, ours in (("LlamaConfig", LLAMA), ("MiniCPM3Config", {})):
        if hasattr(transformers, own):
            expected = getattr(transformers, own)(**copy.deepcopy(theirs))
            parsed = parse(config, **{"rope_scaling": ABSENT, **ours, **rope})
            assert parsed.rope_theta == expected.rope_parameters["rope_theta"]
            assert expected.rope_parameters["rope_type"] == "default"


def test_what_rope_leaves_out_is_said(config: dict[str, Any]) -> None:
    scaling = {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0}
    notices = notices_of(config, rope_theta=3e4, rope_scaling=scaling)
    assert "config.json: rope_theta 30000 is ignored: rope_scaling has 500000" in notices[1]
    assert "ignores 'factor'" in notices[0]
    assert not notices_of(config, rope_theta=5e5, rope_scaling={**scaling, "factor": None})


def test_missing_keys_get_the_defaults_of_their_class(config: dict[str, Any]) -> None:
    absent = dict.fromkeys(llama.CLASS_DEFAULTS, ABSENT)
    for architecture in ("LlamaForCausalLM", "MiniCPMForCausalLM"):
        [notice] = notices_of(config, architectures=[architecture], **absent)
        assert notice.startswith("config.json: lacks max_position_embeddings, rms_norm_eps, hidden")
        assert notice.endswith(
            "are used: max_position_embeddings 2048, rms_norm_eps 1e-06, hidden_act 'silu'"
        )
    parsed = parse(config, **absent)
    assert (parsed.max_context, parsed.rms_norm_eps, parsed.activation) == (2048, 1e-6, "silu")
    assert notices_of(config, rms_norm_eps=None)[0].endswith("are used: rms_norm_eps 1e-06")
    assert notices_of(config) == []


def test_the_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    default = transformers.LlamaConfig()
    assert {key: getattr(default, key) for key in llama.CLASS_DEFAULTS} == llama.CLASS_DEFAULTS


@pytest.mark.parametrize(
    ("changes", "expected", "notice"),
    [
        ({"eos_token_id": 10}, {"eos_ids": ()}, "eos_token_id 10 is not in the vocabulary"),
        ({"eos_token_id": [2, 10, -1]}, {"eos_ids": (2,)}, "whose ids end at 9; it is ignored"),
        ({"bos_token_id": 10}, {"bos_id": None}, "bos_token_id 10 is not in the vocabulary"),
        ({"bos_token_id": -1}, {"bos_id": None}, "bos_token_id -1 is not"),
        ({"pad_token_id": 10}, {}, "'pad_token_id 10': not in the vocabulary"),
        ({"pad_token_id": -1, "image_token_id": 99}, {}, "'pad_token_id -1', 'image_token_id 99'"),
        ({"architectures": None, "model_type": "llama"}, {"family": "llama"}, "'llama' is that of"),
        ({"architectures": ["LlamaModel"]}, {"family": "llama"}, "saved without its head"),
        ({**LLAMA, "auto_map": {"AutoModel": "flash.Llama"}}, {}, "code in the model's folder"),
    ],
)
def test_oddities_are_accepted_with_a_notice(
    config: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any], notice: str
) -> None:
    parsed = parse(config, **changes)
    assert {key: getattr(parsed, key) for key in expected} == expected
    [line] = notices_of(config, **changes)
    assert line.startswith("config.json: ")
    assert notice in line
    assert len(line) < 300
