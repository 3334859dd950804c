"""A whole run with every phase in FP8: each leaves it past its guard and comes back, and a resumed run is the same.

Three runs, each with two starts of an engine or more: half a minute on a quiet machine.
"""

from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, metrics, run, write_inputs

LEARNING_STEPS = 12
FP8: dict[str, str | None] = {
    **{"--rollout_dtype": "fp8", "--log_prob_dtype": "fp8", "--train_dtype": "fp8"},
    **{"--fp8-recipe": "delayed", "--fp8-amax-history-len": "4", "--fp8-amax-compute-algo": "max"},
    **{"--fp8_fallback_steps": "2", "--fp8_max_saturated": "0.5"},
    # fp32 differs by 1e-5, FP8 by 1e-2
    **{"--logprob_diff_budget": "1e-3", "--logprob_kl_budget": "1"},
    **{"--lr_decay_style": "constant", "--advantage_estimator": "rloo", "--save-interval": "1"},
}


@pytest.mark.slow
def test_a_policy_in_fp8_learns_as_one_in_fp32(assets: Path, tmp_path: Path) -> None:
    flags: dict[str, str | None] = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model")}
    flags |= {"--rollout_batch_size": "32", "--n_samples_per_prompt": "4", "--global-batch-size": "64"}
    flags |= {"--micro-batch-size": "64", "--actor_learning_rate": "1e-3", "--advantage_estimator": "rloo"}
    flags |= {"--train-iters": str(LEARNING_STEPS)}
    fp8: dict[str, str | None] = {"--rollout_dtype": "fp8", "--log_prob_dtype": "fp8", "--train_dtype": "fp8"}
    learned = {}
    for name, more in (("fp32", {}), ("fp8", fp8)):
        run("train_ppo", flags | more | {"--save": str(tmp_path / name)})
        rewards = [row["reward/mean"] for row in metrics(tmp_path / name).values() if "reward/mean" in row]
        assert len(rewards) == LEARNING_STEPS
        learned[name] = sum(rewards[-4:]) / 4
        assert rewards[0] < 0.2 and learned[name] > 0.35, (name, rewards)
    assert learned["fp8"] == pytest.approx(learned["fp32"], abs=0.05)
    last = metrics(tmp_path / "fp8")[LEARNING_STEPS]
    assert last["precision/train/fp8"] == last["precision/log_prob/fp8"] == 1
    assert last["rollout/logprob_diff_mean"] > 1e-3, "the engine rounds"


@pytest.mark.slow
def test_every_phase_leaves_fp8_and_comes_back(assets: Path, tmp_path: Path) -> None:
    flags = SMALL | write_inputs(tmp_path) | FP8 | {"--pretrain": str(assets / "model")}

    def train(name: str, steps: int, load: str | None = None) -> str:
        more = {"--save": str(tmp_path / name), "--train-iters": str(steps)}
        return run("train_ppo", flags | more | ({} if load is None else {"--load": str(tmp_path / load)}))

    said = train("whole", 4)
    assert "rollout leaves fp8 for fp32 for 2 steps (fp8_fallback_steps=2): rollout/logprob_diff_mean=" in said
    assert "log_prob leaves fp8 for fp32 for 2 steps" in said and "rollout computes in fp8 again" in said
    rows = metrics(tmp_path / "whole")
    # Step 1: log-probs are in fp32 as delayed scales come from training, so the rollout's FP8 alone is to blame. Step 2
    # and 3: it is in fp32, and log-probs in FP8 leave it. Step 4: it is in FP8 again.
    assert [rows[step]["precision/rollout/fallbacks"] for step in range(1, 5)] == [1, 1, 1, 2]
    assert [rows[step]["precision/log_prob/fallbacks"] for step in range(1, 5)] == [0, 1, 1, 2]
    assert [rows[step]["precision/train/fp8"] for step in range(1, 5)] == [1, 1, 1, 1]
    assert rows[2]["rollout/logprob_diff_mean"] < 1e-4 < 1e-3 < rows[1]["rollout/logprob_diff_mean"]
    assert rows[1]["policy/tis_mean"] != 1 and rows[1]["precision/train/amax"] > 0

    train("half", 2)
    assert "rollout computes in fp8 again" in train("rest", 4, load="half")
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "rest")]
    assert weights[0] == weights[1]
