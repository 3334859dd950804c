"""Whole runs in layouts of their own: actor and critic cut differently, a policy with experts, several engines."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, metrics, run, write_inputs
from tests.tiny_models import make_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("placement", ["colocated", "disjoint"])
def test_actor_and_critic_have_their_own_layouts(assets: Path, tmp_path: Path, placement: str) -> None:
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--save": str(tmp_path / "run")}
    flags |= {"--train-iters": "3", "--actor_num_gpus_per_node": "2", "--tensor-model-parallel-size": "2"}
    flags |= {"--sequence-parallel": None, "--top_p": "0.8", "--top_k": "20"}
    flags |= {"--critic_tensor_model_parallel_size": "1", "--critic_pipeline_model_parallel_size": "2"}
    if placement == "disjoint":
        flags |= {"--no-colocate-all-models": None, "--critic_num_virtual_stages_per_pipeline_rank": "2"}
    output = run("train_ppo", flags)
    rows = metrics(tmp_path / "run")
    assert set(rows) == {0, 1, 2, 3}, output
    assert all(rows[step]["rollout/logprob_diff_max"] <= 1e-4 for step in (1, 2, 3))
    wanted = rows[1]["return/mean"] - rows[1]["critic/value_mean"]  # the first step goes that way, and here past it
    assert (rows[2]["critic/value_mean"] - rows[1]["critic/value_mean"]) * wanted > 0, "the critic learns"


@pytest.mark.parametrize("layout", ["EP2", "TP2-SP-EP2-ETP1"])
def test_a_policy_with_experts(assets: Path, tmp_path: Path, layout: str) -> None:
    source = make_model(tmp_path / "mixtral", family="mixtral", vocab_size=128, max_position_embeddings=128)
    for file in (assets / "model").iterdir():
        if file.name.startswith(("tokenizer", "special", "generation", "chat")):
            shutil.copy(file, source)
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(source), "--save": str(tmp_path / "run")}
    flags |= {"--train-iters": "2", "--actor_num_gpus_per_node": "2", "--expert-model-parallel-size": "2"}
    flags |= {"--moe-aux-loss-coeff": "0.01"}
    if layout == "EP2":
        flags |= {"--overlap-grad-reduce": None, "--overlap-param-gather": None, "--init_kl_coef": "0.01"}
    else:
        flags |= {
            "--tensor-model-parallel-size": "2",
            "--sequence-parallel": None,
            "--expert_tensor_parallel_size": "1",
        }
    run("train_ppo", flags)
    rows = metrics(tmp_path / "run")
    assert all(rows[step]["rollout/logprob_diff_max"] <= 1e-4 for step in (1, 2))
    for phase in ("policy", "critic"):
        assert 0.9 <= rows[2][f"{phase}/moe_balance_loss"] < 1.5  # near 1, which is perfect balance
        assert rows[2][f"{phase}/moe_load_max"] >= 1.0
        assert rows[2][f"{phase}/moe_router_log_prob"] < 0


def test_three_engines_give_the_run_of_one(assets: Path, tmp_path: Path) -> None:
    """A sample under another prompt's group, or with another seed, would change rewards and baselines."""
    flags = SMALL | write_inputs(tmp_path, count=7) | {"--pretrain": str(assets / "model"), "--train-iters": "2"}
    flags |= {"--advantage_estimator": "rloo", "--generate_max_len": "6"}
    for engines in ("1", "3"):  # 8 prompts a step: 3, 3 and 2; with 7 prompts in the data one comes twice
        run("train_ppo", flags | {"--vllm_num_engines": engines, "--save": str(tmp_path / engines)})
    one, three = metrics(tmp_path / "1"), metrics(tmp_path / "3")
    for step in (1, 2):
        for key in ("reward/mean", "reward/std", "rollout/response_length_mean", "rollout/truncated_frac"):
            assert three[step][key] == one[step][key], (step, key)
        for key in ("policy/loss", "policy/grad_norm", "advantage/std", "kl/mean"):
            assert three[step][key] == pytest.approx(one[step][key], rel=1e-3, abs=1e-5), (step, key)
    assert one[1]["reward/std"] > 0 and one[1]["policy/grad_norm"] > 0


@pytest.mark.parametrize("placement", ["colocated", "disjoint"])
def test_weights_that_are_broadcast_give_the_run_of_shared_memory(
    assets: Path, tmp_path: Path, placement: str
) -> None:
    """Bit for bit, and without a place in shared memory."""
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--train-iters": "2"}
    flags |= {"--actor_num_gpus_per_node": "2", "--pipeline-model-parallel-size": "2", "--vllm_num_engines": "2"}
    flags |= {"--advantage_estimator": "rloo"} | ({"--no-colocate-all-models": None} if placement == "disjoint" else {})
    said = [
        run("train_ppo", flags | {"--weight_transport": way, "--update_weight_buffer_mib": "1", "--save": str(save)})
        for way in ("shared_memory", "broadcast")
        for save in (tmp_path / way,)
    ]
    assert "weights to the engines: broadcast (as weight_transport says; the actor's ranks and the engines" in said[1]
    one, other = metrics(tmp_path / "shared_memory"), metrics(tmp_path / "broadcast")
    for step in (1, 2):
        assert other[step]["rollout/logprob_diff_max"] <= 1e-4
        for key in ("reward/mean", "policy/loss", "policy/grad_norm", "rollout/logprob_diff_max", "sync/bytes"):
            assert other[step][key] == one[step][key], (step, key)
    weights = [(tmp_path / way / "hf" / "model.safetensors").read_bytes() for way in ("shared_memory", "broadcast")]
    assert weights[0] == weights[1]
