"""An evaluation by itself says of a run's models what the run's own evaluations said. Whole runs, so slow."""

import json
from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, metrics, run, write_inputs
from tests.cluster.test_reward_runs import reward_model

pytestmark = pytest.mark.slow
EVALUATION = {"--eval_n_samples_per_prompt": "4", "--eval_temperature": "0.8"}


def of_evaluation(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def test_a_run_and_its_exports_are_measured_alike(assets: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"input": f"{i}8="}) + "\n" for i in range(5)))
    given = EVALUATION | {"--eval_data": f"{inputs['--eval_data']},more={tmp_path / 'more.jsonl'}"}
    judge = reward_model(assets, tmp_path / "judge", seed=5, mean=0.25, std=0.5)
    given |= {"--reward_pretrain": str(judge), "--reward_num_gpus_per_node": "2", "--normalize_reward": None}
    given |= {"--reward_pipeline_model_parallel_size": "2"}
    small = {key: SMALL[key] for key in ("--prompt_max_len", "--generate_max_len", "--vllm_kv_cache_gib", "--seed")}
    save = tmp_path / "run"
    own = {"--advantage_estimator": "rloo", "--train-iters": "5", "--eval-interval": "1", "--max_ckpt_num": "1"}
    best = {"--best_metric": "eval/reward_mean", "--no_ray": None}
    model = {"--pretrain": str(assets / "model"), "--save": str(save)}
    out = run("train_ppo", SMALL | inputs | given | own | best | model)
    rows = metrics(save)
    values = {step: row["eval/reward_mean"] for step, row in rows.items() if step}
    step = max(values, key=lambda step: (values[step], -step))
    assert len(set(values.values())) > 1 and f"after step {step}, {save / 'hf_best'}" in out
    kept = {path.name for path in (save / "checkpoints").glob("iter_*")}
    assert kept == {f"iter_{step:07d}", "iter_0000005"}, "the best and the last"
    for name, number in (("hf", 5), ("hf_best", step)):
        result = tmp_path / f"{name}.json"
        flags = small | given | {"--reward_function": inputs["--reward_function"], "--output": str(result)}
        flags |= {"--pretrain": str(save / name), "--responses": str(tmp_path / f"{name}.jsonl")}
        out = run("evaluate", flags)
        found = json.loads(result.read_text())
        # The run answers 3 prompts at a time, this all, and a reward model's packed rows differ so.
        assert found["metrics"] == pytest.approx(of_evaluation(rows[number]), abs=1e-5), name
        exact = [key for key in found["metrics"] if not key.endswith("reward_mean")]
        assert {key: found["metrics"][key] for key in exact} == {key: rows[number][key] for key in exact}
        assert {"eval/pass@4", "eval/more/accuracy"} <= set(exact)
        assert found["num_prompts"] == {"eval": 4, "more": 5} and "pass@4" in out
        responses = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(responses) == 9 + 9 * 4
        greedy = [row["reward"] for row in responses if row["sample"] is None and row["set"] == "more"]
        assert sum(greedy) / 5 == pytest.approx(found["metrics"]["eval/more/reward_mean"])
