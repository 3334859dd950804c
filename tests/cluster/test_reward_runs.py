"""Whole runs with reward models on ranks of their own, whose scores Transformers computes beside them."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, metrics, run, write_inputs
from tests.tiny_models import make_reward_model

# The reward function is the oracle: Transformers' classifier on the text of prompt and response.
ORACLE = """
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

def reward_func(queries, prompts, labels):
    model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # else a response whose last token is a sampled <pad> is read before that
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    found = []
    with torch.no_grad():
        for query in queries:
            ids = tokenizer(query, add_special_tokens=False, return_tensors="pt").input_ids
            found.append(model(ids).logits.item())
    return found
"""


def reward_model(assets: Path, directory: Path, *, seed: int, **entries: float) -> Path:
    """A classifier with the demo's tokenizer."""
    model = make_reward_model(directory, seed=seed, entries=entries, vocab_size=128, max_position_embeddings=64)
    for file in (assets / "model").glob("*token*"):
        shutil.copy(file, model)
    return model


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of PPO against two reward models and the oracle of the first, colocated and disjoint."""
    directory = tmp_path_factory.mktemp("rewards")
    first = reward_model(assets, directory / "first", seed=5, mean=0.25, std=0.5)
    second = reward_model(assets, directory / "second", seed=6, mean=-1.0, std=2.0)
    flags = SMALL | write_inputs(directory) | {"--pretrain": str(assets / "model"), "--train-iters": "2"}
    (directory / "oracle.py").write_text(f"DIRECTORY = {str(first)!r}\n{ORACLE}")
    flags |= {"--reward_function": str(directory / "oracle.py"), "--no_reward_skip_special_tokens": None}
    flags |= {"--reward_pretrain": f"{first},{second}", "--reward_weights": "0.5,-2,0.125"}
    flags |= {"--actor_num_gpus_per_node": "2", "--reward_num_gpus_per_node": "2", "--reward_timeout_seconds": "60"}
    flags |= {"--reward_pipeline_model_parallel_size": "2,1", "--eval-interval": "1", "--normalize_reward": None}
    for placement in ("colocated", "disjoint"):
        own = {} if placement == "colocated" else {"--no_colocate_all_models": None}
        run("train_ppo", flags | own | {"--save": str(directory / placement)})
    return {placement: directory / placement for placement in ("colocated", "disjoint")}


@pytest.mark.slow
def test_scores_are_those_of_transformers_and_the_reward_their_weighted_sum(finished: dict[str, Path]) -> None:
    rows = metrics(finished["colocated"])
    for step in (1, 2):
        row = rows[step]
        oracle = row["reward/function/mean"]
        assert row["reward/reward_model_0/mean"] == pytest.approx((oracle - 0.25) / 0.5, abs=2e-5)
        assert abs(oracle) > 0.01
        parts = (0.5, "reward_model_0"), (-2.0, "reward_model_1"), (0.125, "function")
        expected = sum(weight * row[f"reward/{name}/mean"] for weight, name in parts)
        assert row["reward/mean"] == pytest.approx(expected, abs=1e-6)
    assert rows[1]["reward/reward_model_0/mean"] != rows[1]["reward/reward_model_1/mean"]
    assert all("eval/reward_mean" in rows[step] for step in (0, 1, 2))


@pytest.mark.slow
def test_colocated_and_disjoint_models_give_the_same_rewards(finished: dict[str, Path]) -> None:
    one, other = (metrics(finished[placement]) for placement in ("colocated", "disjoint"))
    for step in (1, 2):
        for key in ("reward/mean", "reward/std", "reward/reward_model_0/mean", "reward/reward_model_1/mean"):
            assert other[step][key] == pytest.approx(one[step][key], abs=1e-5), key
    assert other[2]["policy/loss"] == pytest.approx(one[2]["policy/loss"], abs=1e-4)


@pytest.mark.slow
def test_reward_models_take_turns_with_the_others(finished: dict[str, Path]) -> None:
    logs = finished["colocated"] / "logs"
    told = {
        role: [line.partition(" ")[2].partition(";")[0] for line in (logs / f"{role}-0.log").open()]
        for role in ("reward_0", "reward_1", "rollout")
    }
    turns = [line for line in told["reward_0"] if line.startswith(("sleep", "wake"))]
    assert turns[1:] == ["wake parameters", "sleep parameters"] * (len(turns) // 2), "for rewards alone"
    assert len(turns) == 1 + 2 * 5, "three evaluations and two steps"
    assert any(line.startswith("sleep, weights kept") for line in told["rollout"]), "after an evaluation"
    dropped = [line for line in told["rollout"] if line.startswith("sleep, weights dropped")]
    assert len(dropped) == 3, "a step replaces its weights"
    assert not any(
        line.split(" ", 1)[1].startswith(("sleep", "wake"))
        for line in (finished["disjoint"] / "logs" / "reward_1-0.log").read_text().splitlines()
        if " " in line
    )
