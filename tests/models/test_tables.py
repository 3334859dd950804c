"""What an architecture's table refuses, by the name of the configuration's key."""

from pathlib import Path

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, Gemma2Config, Gemma3TextConfig, PretrainedConfig

from megarlhf.models.gemma import GEMMA2, GEMMA3
from megarlhf.models.registry import check_computing, check_transformer_engine, find_architecture
from tests.distributed.layouts import LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

CLASSES = {
    "Gemma2ForCausalLM": Gemma2Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "DeepseekV2ForCausalLM": DeepseekV2Config,
    "DeepseekV3ForCausalLM": DeepseekV3Config,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
REFUSED = [
    ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation=gelu"),
    ("Gemma2ForCausalLM", {"attention_bias": True}, "attention_bias=True"),
    ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("Gemma2ForCausalLM", {"rope_parameters": YARN}, "rope_type=yarn"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": YARN}}, "rope_type=yarn of layers with a window"),
    ("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}, "topk_method=group_limited_greedy"),
    ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("DeepseekV3ForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("DeepseekV3ForCausalLM", {"topk_group": 8}, "topk_group=8"),
    ("DeepseekV3ForCausalLM", {"rope_interleave": False}, "rope_interleave=False"),
    ("DeepseekV3ForCausalLM", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ("DeepseekV3ForCausalLM", {"attention_bias": True}, "attention_bias"),
    ("DeepseekV3ForCausalLM", {"n_shared_experts": 0}, "n_shared_experts=0"),
    ("DeepseekV3ForCausalLM", {"rope_parameters": YARN | {"mscale": 0.7}}, "only one of mscale and mscale_all_dim"),
    ("DeepseekV3ForCausalLM", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor=1.2"),
    ("DeepseekV3ForCausalLM", {"rope_parameters": YARN | {"truncate": False}}, "truncate=False"),
    ("DeepseekV3ForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
]


def _config(name: str, **options: object) -> PretrainedConfig:
    return CLASSES[name](architectures=[name], **options)


@pytest.mark.parametrize("name", CLASSES)
def test_the_published_configuration_is_accepted(name: str) -> None:
    config = _config(name)
    arch = find_architecture(config)
    check_computing(arch, config)
    assert arch.hf_class == name


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_a_table_cannot_express_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = _config(name, **options)
        check_computing(find_architecture(config), config)


def test_a_reward_model_is_found_by_its_own_class() -> None:
    config = Gemma3TextConfig(architectures=["Gemma3TextForSequenceClassification"])
    assert find_architecture(config).hf_class == "Gemma3ForCausalLM"


def test_what_transformer_engine_lacks_is_refused() -> None:
    windowed, capped = Gemma3TextConfig(sliding_window=512), Gemma2Config(attn_logit_softcapping=50.0)
    check_transformer_engine(GEMMA3, windowed, context_parallel_size=1)
    with pytest.raises(ValueError, match="context_parallel_size=2: .* 512 tokens: use 1; or set"):
        check_transformer_engine(GEMMA3, windowed, context_parallel_size=2)
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50.0.*; context_parallel_size=2"):
        check_transformer_engine(GEMMA2, capped, context_parallel_size=2)


def construct(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> str:
    """The message of an engine that refuses its layout."""
    with world(layout, rank, init_method), pytest.raises(ValueError) as raised:
        build(layout, model_dir)
    return str(raised.value)


def test_latent_attention_refuses_tensor_without_sequence_parallelism(ranks: RankPool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="deepseek-v3")
    for message in ranks.run(2, construct, LAYOUTS["TP2"], model_dir):
        assert "sequence_parallel=False" in message and "tensor_model_parallel_size=2" in message
