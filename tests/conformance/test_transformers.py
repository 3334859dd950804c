"""One engine process against Transformers' own models: log-probs, values, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.distributed.cases import Result, assemble, conformance_case, make_rows, sequences
from tests.distributed.layouts import SINGLE, Layout
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 3000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.8,
        "mscale_all_dim": 0.6,
        "beta_fast": 6,  # few enough turns that the range's start, which YaRN rounds, is another than with 32
        "beta_slow": 2,
    }
}
SOME_LAYERS = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}  # of four, the second alone has experts
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tied": True},
    "llama3-rope": {"family": "llama", **LLAMA3_ROPE},
    "mistral": {"family": "mistral", "tied": True},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": True},
    "mixtral": {"family": "mixtral", "tied": True},
    "qwen2-moe": {"family": "qwen2-moe"},
    "qwen2-moe-some": {"family": "qwen2-moe", "tied": True, "norm_topk_prob": True, **SOME_LAYERS},
    "qwen3-moe": {"family": "qwen3-moe"},
    "qwen3-moe-some": {"family": "qwen3-moe", "tied": True, "norm_topk_prob": False, **SOME_LAYERS},
    "gemma2": {"family": "gemma2"},
    "gemma2-untied": {"family": "gemma2", "tie_word_embeddings": False, "attn_logit_softcapping": None},
    "gemma3": {"family": "gemma3"},
    "gemma3-untied": {"family": "gemma3", "tie_word_embeddings": False},
    "deepseek-v2": {"family": "deepseek-v2"},
    "deepseek-v2-yarn": {"family": "deepseek-v2", "tied": True, "q_lora_rank": 48, **YARN},
    "deepseek-v3": {"family": "deepseek-v3"},
    "deepseek-v3-yarn": {"family": "deepseek-v3", "tied": True, **YARN},
    "deepseek-v3-plain": {"family": "deepseek-v3", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
}
PACKINGS = {
    "packed": Layout(max_tokens=200),
    "shared-prefix": Layout(share_prefix=True, max_tokens=200),
    "one by one": Layout(max_tokens=int(make_rows().lengths.max())),  # two hardly fit
}

# Of a family's first model every packing, of the others that differ in a few fields one.
FIRST = {options["family"]: name for name, options in reversed(MODELS.items())}
CASES = [(name, packing) for name in MODELS for packing in PACKINGS if packing == "packed" or name in FIRST.values()]


def sft_gradients(
    model: PreTrainedModel, temperature: float, scratch: Path
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Per row log-probs of the targets, and the gradient of their negated mean, one row at a time.

    Gradients come under the names of a checkpoint, where experts lie one by one: saved as if they were the weights.
    """
    rows, log_probs = make_rows(), []
    denominator = int(rows.num_targets.sum())
    for tokens, prompt_length in sequences(rows):
        ids = torch.tensor([tokens])
        logits = model(ids[:, :-1]).logits[0, prompt_length - 1 :] / temperature
        chosen = logits.log_softmax(-1).gather(-1, ids[0, prompt_length:, None])[:, 0]
        (-chosen.sum() / denominator).backward()
        log_probs.append(chosen.detach())
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(scratch)
    gradients = load_file(scratch / "model.safetensors")
    return log_probs, {name: g for name, g in gradients.items() if not name.endswith("e_score_correction_bias")}


Oracle = tuple[Path, list[torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A model by its name, and what Transformers computes with it."""
    root = tmp_path_factory.mktemp("conformance")
    directory = make_model(root / "model", **MODELS[request.param])
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return directory, *sft_gradients(model, 0.8, root / "gradients")


@pytest.mark.parametrize(("oracle", "packing"), CASES, indirect=["oracle"])
def test_log_probs_and_gradients(ranks: RankPool, oracle: Oracle, packing: str) -> None:
    directory, expected, gradients = oracle
    result: Result = ranks.run(1, conformance_case, PACKINGS[packing], directory, "sft", 0.8)[0]
    for row, log_probs in enumerate(expected):
        torch.testing.assert_close(result.forward[row], log_probs, atol=1e-5, rtol=0)
    found = assemble([result.gradients])
    assert set(found) == set(gradients)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            found[parameter], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "deepseek-v3"])
def test_values_of_a_reward_model(ranks: RankPool, tmp_path: Path, family: str) -> None:
    directory = make_model(tmp_path / "lm", family=family)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.score.weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "rm")
    result: Result = ranks.run(1, conformance_case, SINGLE, tmp_path / "rm", "critic", 1.0)[0]
    for index, (tokens, prompt_length) in enumerate(sequences(make_rows())):
        hidden = model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        values = (hidden @ model.score.weight.T)[prompt_length - 1 :, 0]
        torch.testing.assert_close(result.forward[index], values.detach(), atol=1e-5, rtol=0)
