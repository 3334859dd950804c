"""What `megarlhf eval` refuses, prints and writes; runs of it are in tests/cluster/test_evaluation_runs.py."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import evaluate, train_ppo
from megarlhf.cli.run import check_best_metric
from megarlhf.cli.run_eval import print_table, response_rows
from megarlhf.config.arguments import LoggingArguments
from megarlhf.trainers.evaluation import Answers
from tests.trainers.plain_roles import PlainRoles, make_prompts

MISTAKES = [
    ({"eval_data": None}, "eval_data is missing"),
    ({"output": "results.txt"}, "output=results.txt must end in .json (one object is written)"),
    ({"responses": "r.json"}, "responses=r.json must end in .jsonl (one object a line is written)"),
    ({"reward_rule": None}, "nothing scores"),
    ({"max_untrained_steps": 5}, "max_untrained_steps is ignored"),
    ({"reward_num_gpus_per_node": 2}, "reward_num_gpus_per_node=2 is ignored without reward_pretrain"),
    ({"micro_batch_size": 2}, "micro_batch_size=2 is ignored without reward_pretrain"),
    ({"reward_pretrain": "nowhere", "reward_rule": None}, "reward_pretrain=nowhere is not a local directory"),
    (
        {"reward_pretrain": "judge", "reward_rule": None, "eval_n_samples_per_prompt": 3},
        "eval_n_samples_per_prompt=3 is for eval/pass@K, which reward_rule or reward_function judges",
    ),
    ({"reward_pretrain": "short"}, "above max_position_embeddings=20 of reward_pretrain"),
    ({"reward_pretrain": "judge", "reward_context_parallel_size": 2}, "makes 1 ranks, no multiple of reward_tensor"),
    ({"reward_pretrain": "judge", "reward_weights": "1"}, "reward_weights=1.0 has 1 numbers for 2 sources"),
    ({"eval_temperature": 0.5}, "eval_temperature=0.5 is ignored with eval_n_samples_per_prompt=0"),
    ({"prompt_max_len": 250}, "prompt_max_len + generate_max_len = 1274 is above max_position_embeddings=256"),
    ({"vllm_tensor_parallel_size": 3}, "vllm_tensor_parallel_size=3 does not divide"),
    ({"input_template": "no place"}, "must hold one {} for the prompt"),
    ({"pretrain": "nowhere"}, "pretrain=nowhere is not a local directory"),
    ({"eval_data": "m=nowhere.jsonl"}, "eval_data=nowhere.jsonl does not exist here"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES)
def test_one_mistake(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"num_attention_heads": 4, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    for name, positions in (("judge", 256), ("short", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": positions}))
    (tmp_path / "d.jsonl").write_text("{}\n")
    given = {"pretrain": ".", "eval_data": "d.jsonl", "output": "results.json", "reward_rule": "math"}
    given |= {"prompt_max_len": 16, "generate_max_len": 1024 if "prompt_max_len" in changes else 16} | changes
    status = evaluate.main([f"--{name}={value}" for name, value in given.items() if value is not None])
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(errors) == 1 and said in errors[0], errors


def test_the_table_has_a_column_for_each_set(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"eval/math/accuracy": 0.25, "eval/code/accuracy": 0.75, "eval/code/pass@2": 0.5, "eval/accuracy": 0.5}
    print_table(metrics | {"eval/pass@2": 0.5}, {"math": 3, "code": 4})
    lines = [re.findall(r"[\w@.]+", line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        *(["math", "code", "all"], ["prompts", "3", "4", "7"]),
        *(["accuracy", "0.25", "0.75", "0.5"], ["pass@2", "0.5", "0.5"]),
    ]


def test_responses_come_with_their_prompts_and_rewards() -> None:
    plain = PlainRoles()
    plain.phase = "evaluate"
    prompts = [replace(prompt, index=prompt.index + 7) for prompt in make_prompts(2)]
    greedy, sampled = (plain.answer(prompts, n_samples=n, temperature=t).samples for n, t in ((1, 0.0), (2, 0.5)))
    greedy = [replace(s, reward=0.5, response_text="r</s>", stop_text="</s>") for s in greedy]
    rows = list(response_rows({"math": Answers(greedy=greedy, sampled=sampled)}))
    assert [(row["index"], row["sample"]) for row in rows] == [(7, None), (8, None), (7, 0), (7, 1), (8, 0), (8, 1)]
    assert rows[1] == {
        **{"set": "math", "index": 8, "sample": None, "input": "p1", "output": "r", "label": "1", "reward": 0.5},
        "finish_reason": greedy[1].finish_reason,
    }
    assert rows[2]["reward"] is None


def test_a_metric_that_no_evaluation_has_is_told_with_those_that_there_are() -> None:
    logging = LoggingArguments(save="s", best_metric="eval/acuracy")
    with pytest.raises(ValueError, match="best_metric=eval/acuracy is no metric of an evaluation .* eval/accuracy"):
        check_best_metric(logging, ["eval/accuracy", "eval/math/accuracy"])
    check_best_metric(replace(logging, best_metric="eval/math/accuracy"), ["eval/math/accuracy"])
    check_best_metric(replace(logging, best_metric=None), [])


def test_what_a_reward_never_reports_cannot_be_best(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Servers and models have scales of their own, which say nothing of what is right."""
    (tmp_path / "prompts.jsonl").write_text('{"input": "1=", "label": "1"}\n')
    flags = {"pretrain": assets / "model", "prompt_data": tmp_path / "prompts.jsonl", "save": tmp_path / "run"}
    flags |= {"advantage_estimator": "reinforce", "rollout_batch_size": 1, "global_batch_size": 1}
    flags |= {"prompt_max_len": 8, "generate_max_len": 8, "eval_data": f"m={tmp_path / 'prompts.jsonl'}"}
    words = [*(f"--{key}={value}" for key, value in flags.items()), "--remote_rm_url=http://127.0.0.1:9/x", "--dry-run"]
    assert train_ppo.main([*words, "--best_metric", "eval/accuracy"]) == 2
    said = "best_metric=eval/accuracy is no metric of an evaluation here: use one of eval/reward_mean, eval/resp"
    assert said in capsys.readouterr().err
    assert train_ppo.main([*words, "--best_metric", "eval/m/reward_mean"]) == 0
    assert train_ppo.main([*words, "--reward_rule", "math", "--best_metric", "eval/m/accuracy"]) == 0
