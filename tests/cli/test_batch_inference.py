"""Command lines of OpenRLHF 0.5's batch_inference: each flag's meaning, up to the programs that they start."""

import shlex
from functools import partial
from typing import Any

import pytest

from megarlhf.cli import batch_inference, generate, score, select
from megarlhf.config.command_line import parse, to_dict
from megarlhf.config.loop_arguments import GenerateConfig, ScoreConfig, SelectConfig

FLAGS: dict[str, str] = {  # all 37 of 0.5.3 -> a value that its parser takes; "" for a switch
    **{"eval_task": "", "zero_stage": "0", "local_rank": "-1", "bf16": "", "flash_attn": "", "micro_batch_size": "16"},
    **{"seed": "1234", "pretrain": "m", "value_head_prefix": "value_head", "dataset": "d", "dataset_probs": "1.0"},
    **{"dataset_split": "test", "input_key": "q", "output_key": "a", "apply_chat_template": "", "max_len": "2049"},
    **{"input_template": "'Q: {} A:'", "max_samples": "7", "output_path": "o.jsonl", "prompt_max_len": "33"},
    **{"max_new_tokens": "34", "greedy_sampling": "", "top_p": "0.9", "temperature": "0.7", "best_of_n": "4"},
    **{"repetition_penalty": "1.2", "post_processor": "rs", "tp_size": "2", "max_num_seqs": "128", "iter": "3"},
    **{"enable_prefix_caching": "", "rollout_batch_size": "512", "normalize_reward": "", "enable_csft": ""},
    **{"reward_template": "'{input}|{reward}'", "csft_prompt": "'<rm_score>: 4.00'", "disable_fast_tokenizer": ""},
}
GENERATED: dict[str, dict[str, Any]] = {  # what a flag sets of megarlhf generate; others have no effect there
    **{"seed": {"seed": 1234}, "pretrain": {"pretrain": "m"}, "dataset": {"prompt_data": "d"}, "bf16": {"bf16": True}},
    **{"dataset_probs": {"prompt_data_probs": "1.0"}, "dataset_split": {"prompt_split": "test"}},
    **{"input_key": {"input_key": "q"}, "apply_chat_template": {"apply_chat_template": True}},
    **{"input_template": {"input_template": "Q: {} A:"}, "max_samples": {"max_samples": 7}},
    **{"output_path": {"output": "o.jsonl"}, "prompt_max_len": {"prompt_max_len": 33}},
    **{"max_new_tokens": {"generate_max_len": 34}, "greedy_sampling": {"greedy": True}, "top_p": {"top_p": 0.9}},
    **{"temperature": {"temperature": 0.7}, "best_of_n": {"n_samples_per_prompt": 4}, "iter": {"iter": 3}},
    **{"repetition_penalty": {"repetition_penalty": 1.2}, "tp_size": {"vllm_tensor_parallel_size": 2}},
    **{"max_num_seqs": {"max_num_seqs": 128}, "rollout_batch_size": {"rollout_batch_size": 512}},
    **{"enable_csft": {"enable_csft": True}, "csft_prompt": {"csft_prompt": "<rm_score>: 4.00"}},
}
Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Programs that are started, and what differs from the defaults; x stands for what is required."""
    found: Calls = []

    def main(name: str, kind: Any, required: str, argv: list[str], prog: str) -> int:
        needed = shlex.split(required)
        plain, given = (to_dict(parse(kind, words, prog)[0]) for words in (needed, [*needed, *argv]))
        found.append((name, {key: given[key] for key in given if given[key] != plain[key]}))
        return 0

    needs = "--pretrain x --prompt_data x --output x"
    monkeypatch.setattr(generate, "main", partial(main, "generate", GenerateConfig, needs))
    monkeypatch.setattr(score, "main", partial(main, "score", ScoreConfig, "--dataset x --output x"))
    needs = "--dataset x --output x --post_processor csft"
    monkeypatch.setattr(select, "main", partial(main, "select", SelectConfig, needs))
    return found


def run(words: str) -> int:
    return batch_inference.main(shlex.split(words))


@pytest.mark.parametrize("task", ["generate", "generate_vllm"])
@pytest.mark.parametrize("flag", FLAGS.keys() - {"eval_task", "disable_fast_tokenizer"})
def test_each_flag_of_generate(task: str, flag: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"--eval_task {task} --{flag} {FLAGS[flag]}") == 0
    assert calls == [("generate", GENERATED.get(flag, {}))]
    assert (flag in GENERATED) == ("no effect" not in capsys.readouterr().err)


SCORED: dict[str, dict[str, Any]] = {
    **{"dataset": {"dataset": "d"}, "input_key": {"input_key": "q"}, "output_key": {"output_key": "a"}},
    **{"max_samples": {"max_samples": 7}, "output_path": {"output": "o.jsonl"}, "bf16": {"bf16": True}},
    **{"pretrain": {"reward_pretrain": "m"}, "max_len": {"max_len": 2049}},
}


@pytest.mark.parametrize("flag", [*SCORED, *batch_inference.UNREAD["rm"], *batch_inference.REFUSED["rm"]])
def test_each_flag_of_rm(flag: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    refused = flag in batch_inference.REFUSED["rm"]
    assert run(f"--eval_task rm --{flag} {FLAGS[flag]}") == (2 if refused else 0)
    assert calls == ([] if refused else [("score", SCORED.get(flag, {}))])
    said = capsys.readouterr().err
    assert (flag in SCORED) == (said == "") and (f"--{flag}" in said or said == "")


def test_no_flag_is_without_a_meaning() -> None:
    assert len(FLAGS) == 37
    known = {*SCORED, *batch_inference.UNREAD["rm"], *batch_inference.REFUSED["rm"], *batch_inference.SELECTING}
    assert known | {"eval_task", "disable_fast_tokenizer"} == FLAGS.keys()
    for task in ("generate", "rm"):
        with pytest.raises(SystemExit):  # the programs refuse it, with the reason
            batch_inference.main(["--eval_task", task, "--disable_fast_tokenizer"])


def test_post_processing_comes_behind_scoring(calls: Calls) -> None:
    line = "--eval_task rm --dataset g.jsonl --output_path rm.jsonl --post_processor csft --normalize_reward"
    assert run(f"{line} --reward_template '{{reward}}: {{input}}' --reward_rule math") == 0
    assert calls == [
        ("score", {"dataset": "g.jsonl", "output": "rm.scored.jsonl", "reward_rule": "math"}),
        (
            "select",
            {
                **{"dataset": "rm.scored.jsonl", "output": "rm.jsonl", "normalize_reward": True},
                "reward_template": "{reward}: {input}",
            },
        ),
    ]
    calls.clear()
    line = "--eval_task rm --pretrain m --dataset g.jsonl --output_path rm.jsonl --normalize_reward --post_processor"
    assert run(f"{line} rs") == 0 == run(f"{line} csft")
    assert [call[1].get("normalize_reward") for call in calls] == [True, None, True, True]
    calls.clear()
    assert run("--eval_task rm --dataset g.jsonl --output_path rm.jsonl --post_processor rs --reward_rule math") == 0
    assert [call[1].get("post_processor") for call in calls] == [None, "rs"]


def test_the_lines_of_openrlhfs_rejection_sampling(calls: Calls) -> None:
    """examples/scripts/train_rejection_sampling_llama.sh; the reward's source is ours."""
    assert 0 == run(
        "--eval_task generate_vllm --pretrain m --max_new_tokens 2048 --prompt_max_len 2048 --dataset d"
        " --temperature 0.9 --tp_size 8 --best_of_n 4 --enable_prefix_caching --max_num_seqs 64 --iter 2"
        " --rollout_batch_size 10240"
        " --output_path g.jsonl --zero_stage 0"
    )
    assert calls == [
        (
            "generate",
            {
                **{"pretrain": "m", "generate_max_len": 2048, "prompt_max_len": 2048, "prompt_data": "d"},
                **{"temperature": 0.9, "vllm_tensor_parallel_size": 8, "n_samples_per_prompt": 4},
                **{"max_num_seqs": 64, "iter": 2, "rollout_batch_size": 10240, "output": "g.jsonl"},
            },
        )
    ]


def test_another_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--eval_task ppo") == 2 and "--eval_task is ppo" in capsys.readouterr().err
    assert run("x --pretrain m") == 2
    said = capsys.readouterr().err
    assert "x stands before any option" in said and "--eval_task is nothing" in said
