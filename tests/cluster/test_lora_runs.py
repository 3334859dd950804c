"""PPO with adapters, as a user starts it: what it learns, what it holds, what it leaves. Whole runs, so slow."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from examples.demo.make_assets import make_tokenizer
from megarlhf.config.lora import LoraArguments
from megarlhf.engine.checkpoint import load_engine
from megarlhf.trainers.parity_cases import parity_rows
from tests.cluster.runs import SMALL, metrics, run, write_inputs
from tests.cluster.test_resume_and_faults import numbers
from tests.distributed.cases import by_row, sequences
from tests.distributed.layouts import SINGLE, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

pytestmark = pytest.mark.slow
STEPS, VOCABULARY = 16, 42
MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def flags(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Two data-parallel ranks of actor and critic, 128 samples a step, two optimizer steps."""
    given = SMALL | write_inputs(tmp_path_factory.mktemp("inputs")) | {"--pretrain": str(assets / "model")}
    given |= {"--lora_rank": "8", "--actor_num_gpus_per_node": "2", "--train-iters": str(STEPS)}
    given |= {"--rollout_batch_size": "32", "--n_samples_per_prompt": "4", "--global-batch-size": "64"}
    given |= {"--micro-batch-size": "64", "--actor_learning_rate": "1e-2", "--critic_learning_rate": "1e-2"}
    return given | {"--save-interval": str(STEPS // 2)}


@pytest.fixture(scope="module")
def finished(flags: dict[str, str | None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("whole") / "run"
    run("train_ppo", flags | {"--save": str(save)})
    return save


def test_it_learns_and_vllm_agrees_after_every_sync(finished: Path) -> None:
    rows = metrics(finished)
    assert set(rows) == set(range(STEPS + 1))
    assert all(rows[step]["rollout/logprob_diff_max"] <= 1e-4 for step in range(1, STEPS + 1))
    assert [rows[step]["sync/version"] for step in range(1, STEPS + 1)] == list(range(1, STEPS + 1))
    rewards = [rows[step]["reward/mean"] for step in range(1, STEPS + 1)]
    assert rewards[0] < 0.2 and min(rewards[-3:]) > 0.3
    assert rows[0]["eval/accuracy"] == 0.0 and rows[STEPS]["eval/accuracy"] >= 0.75
    assert abs(rows[1]["kl/mean"]) < 1e-6 < 0.05 < rows[STEPS]["kl/mean"], "the reference stays where it was"
    assert rows[STEPS]["critic/loss"] < rows[1]["critic/loss"]


def test_one_copy_of_the_base_is_held(finished: Path, assets: Path) -> None:
    first = metrics(finished)[1]
    base = (assets / "model" / "model.safetensors").stat().st_size / 2**30
    trained = (finished / "hf" / "adapter_model.safetensors").stat().st_size / 2**30
    for role in ("actor", "critic"):
        assert first[f"memory/{role}/reference_gib"] == 0.0
        assert first[f"memory/{role}/parameters_gib"] == pytest.approx(base + trained, rel=0.02)
        assert first[f"memory/{role}/gradients_gib"] == pytest.approx(trained, rel=0.05)


def loaded(rank: int, world_size: int, init_method: str, model_dir: Path, directory: Path) -> dict[int, torch.Tensor]:
    """Log-probs of a saved actor, in one process."""
    with world(SINGLE, rank, init_method):
        engine = build(SINGLE, model_dir, lora=LoraArguments(lora_rank=8))
        load_engine(engine, directory, with_optimizer=False)
        rows = parity_rows(VOCABULARY)
        return by_row(rows, engine.log_probs(rows))


def test_checkpoint_and_export_hold_adapters_alone(ranks: RankPool, finished: Path, assets: Path) -> None:
    saved = finished / "checkpoints" / f"iter_{STEPS:07d}"
    for role in ("actor", "critic"):
        state = FileSystemReader(saved / role).read_metadata().state_dict_metadata
        weights = [name for name in state if not name.startswith("optimizer")]
        heads = [name for name in weights if ".lora_" not in name and "score.weight" in name]
        assert len([name for name in weights if ".lora_" in name]) == 4 * len(MODULES) * 2
        assert len(heads) == (role == "critic") and not [n for n in weights if "embedding" in n or "decoder" in n]
    assert json.loads((finished / "hf" / "adapter_config.json").read_text())["target_modules"] == MODULES
    base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, finished / "hf")
    (ours,) = ranks.run(1, loaded, assets / "model", saved / "actor")
    moved = 0.0
    for row, (tokens, prompt) in enumerate(sequences(parity_rows(VOCABULARY))):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            found = model(ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                before = model(ids).logits[0, :-1].log_softmax(-1)
        found, before = (p.gather(-1, ids[0, 1:, None])[prompt - 1 :, 0] for p in (found, before))
        torch.testing.assert_close(ours[row], found, atol=1e-5, rtol=0)
        moved = max(moved, float((found - before).abs().max()))
    assert moved > 0.5


def test_a_run_that_goes_on_equals_one_that_was_never_interrupted(
    flags: dict[str, str | None], finished: Path, tmp_path: Path
) -> None:
    half = shutil.copytree(finished, tmp_path / "half")
    (half / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STEPS // 2))
    run("train_ppo", flags | {"--load": str(half), "--save": str(tmp_path / "rest")})
    expected, found = metrics(finished), metrics(tmp_path / "rest")
    assert set(found) == set(range(STEPS // 2 + 1, STEPS + 1))
    for step, row in found.items():
        assert numbers(row) == numbers(expected[step]), step
    first, second = (load_file(d / "hf" / "adapter_model.safetensors") for d in (finished, tmp_path / "rest"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_critic_with_dropout_and_then_longer(flags: dict[str, str | None], tmp_path: Path) -> None:
    own = flags | {"--advantage_estimator": "group_norm", "--use_kl_loss": None, "--kl_estimator": "k3"}
    own |= {"--save": str(tmp_path / "run"), "--global-batch-size": "128", "--lora_dropout": "0.1"}
    del own["--critic_learning_rate"]
    run("train_ppo", own | {"--train-iters": "2"})
    run("train_ppo", own | {"--train-iters": "4", "--load": str(tmp_path / "run")})
    rows = metrics(tmp_path / "run")
    assert set(rows) == {0, 1, 2, 3, 4} and "critic/loss" not in rows[1]
    assert all(rows[step]["rollout/logprob_diff_max"] <= 1e-4 for step in (1, 2, 3, 4))
    assert rows[4]["kl/mean"] > 0.0 and not (tmp_path / "run" / "checkpoints" / "iter_0000004" / "critic").exists()


def test_in_4_bits(flags: dict[str, str | None], assets: Path, tmp_path: Path) -> None:
    """vLLM gets the matrices that the trainer computes with, and the reference is the quantised base."""
    tokenizer = make_tokenizer()
    model = make_model(tmp_path / "model", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192)
    tokenizer.save_pretrained(model)
    own = flags | {"--pretrain": str(model), "--load_in_4bit": None, "--save": str(tmp_path / "run")}
    run("train_ppo", own | {"--train-iters": "2", "--global-batch-size": "128"})
    rows, whole = metrics(tmp_path / "run"), (model / "model.safetensors").stat().st_size / 2**30
    assert all(rows[step]["rollout/logprob_diff_max"] <= 1e-4 for step in (1, 2))
    assert abs(rows[1]["kl/mean"]) < 1e-6 and rows[2]["kl/mean"] != 0.0
    for role in ("actor", "critic"):
        assert rows[1][f"memory/{role}/parameters_gib"] < 0.5 * whole
