"""What megarlhf iterate configures its stages with, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarlhf.config.check_loops import check_generate, check_iterate, check_score, check_select
from megarlhf.config.command_line import from_dict, options_of, parse, to_dict, to_yaml
from megarlhf.config.loop_arguments import GenerateConfig, IterateConfig, ScoreConfig, SelectConfig
from megarlhf.config.loop_stages import evaluate_config, generate_config, score_config, train_config
from megarlhf.config.supervised_arguments import DPOConfig

# Options that the loop decides for a stage; all others that a stage has under the same name are the loop's.
DECIDED = {
    "generate": {"pretrain", "iter", "enable_csft", "skip_special_tokens", "output"},
    "evaluate": {"pretrain", "prompt_data", "prompt_data_probs", "prompt_split", "n_samples_per_prompt", "greedy"}
    | {"enable_csft"}
    | {"skip_special_tokens", "output"},
    "score": {"dataset", "output", "input_key", "output_key", "label_key", "max_samples", "reward_skip_special_tokens"},
    "train": {"pretrain", "dataset", "save", "load_checkpoint", "use_wandb", "input_key", "output_key", "prompt_key"}
    | {"apply_chat_template", "input_template", "tokenizer_chat_template", "max_samples", "ref_pretrain", "eval_split"},
}


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 3
    return {"other": 1} if isinstance(value, dict) else ("other",) if isinstance(value, tuple) else "other"


def stages(config: IterateConfig) -> dict[str, Any]:
    return {
        "generate": generate_config(config, 2, "m"),
        "evaluate": evaluate_config(config, 2, "m"),
        "score": score_config(config, "a", "b"),
        "train": train_config(config, 2, "m", dataset="s"),
    }


@pytest.mark.parametrize("method", ["rejection_sampling", "iterative_dpo", "conditional_sft"])
def test_every_option_reaches_the_stages_that_have_it(method: str) -> None:
    config = from_dict(IterateConfig, {"method": method, "pretrain": "p", "prompt_data": "d", "save": "run"})
    given = {name: other(value) for name, value in to_dict(config).items() if name not in ("method", "passed")}
    for name, option in options_of(IterateConfig).items():
        if name in given:
            group = replace(getattr(config, option.group), **{name: given[name]})
            config = replace(config, **{option.group: group})
    unread = set(given)
    for stage, own in stages(config).items():
        values = to_dict(own)
        for name in values.keys() & given.keys() - DECIDED[stage]:
            assert values[name] == given[name], (stage, name)
        unread -= values.keys()
    loops_own = {"num_rounds", "eval_data", "reference", "reward_template"}
    dpo = {"beta", "ipo", "label_smoothing", "nll_loss_coef", "ref_pretrain", "precompute_ref_log_probs"}
    dpo |= {"ref_offload"}
    assert unread == loops_own | (set() if method == "iterative_dpo" else dpo)


def test_a_split_is_of_the_prompts_and_a_part_of_what_is_selected() -> None:
    def splits(**given: str) -> tuple[Any, Any, Any]:
        own = {"method": "iterative_dpo", "pretrain": "p", "prompt_data": "d", "save": "run", "eval_data": "e"}
        config = from_dict(IterateConfig, own | {"prompt_split": "first"} | given)
        training = train_config(config, 1, "m", dataset="s").data.eval_split
        learned, evaluated = generate_config(config, 1, "m"), evaluate_config(config, 1, "m")
        return learned.data.prompt_split, evaluated.data.prompt_split, training

    assert splits() == ("first", "first", None)
    assert splits(eval_split="test") == ("first", "test", None)
    assert splits(eval_split="0.03") == ("first", "first", "0.03")


def test_what_the_loop_decides() -> None:
    flags = "--pretrain p --prompt_data d --eval_data e --save run --csft_prompt ok --reward_rule math --max_epochs 3"
    words = [*flags.split(), "--method", "conditional_sft"]
    config, _ = parse(IterateConfig, words, "iterate")
    first, second = (to_dict(generate_config(config, number, "m")) for number in (1, 2))
    assert (first["iter"], first["enable_csft"], first["output"]) == (0, False, "run/round_001/samples.jsonl")
    assert (second["iter"], second["enable_csft"], second["csft_prompt"]) == (1, True, "ok")
    before, after = (to_dict(evaluate_config(config, number, "m")) for number in (0, 2))
    assert (before["greedy"], before["enable_csft"], before["prompt_data"]) == (True, False, "e")
    assert (after["enable_csft"], after["output"]) == (True, "run/round_002/eval_samples.jsonl")
    train = to_dict(train_config(config, 2, "m", dataset="s"))
    assert (train["load_checkpoint"], train["save"], train["max_epochs"]) == (True, "run/round_002/train", 3)
    assert (train["input_key"], train["output_key"], train["dataset"]) == ("input", "output", "s")
    for stage in stages(config).values():  # each is written to a file, and read from it
        assert stage == from_dict(type(stage), yaml.safe_load(to_yaml(stage)))


@pytest.mark.parametrize(
    ("flags", "references"),
    [
        ("", [None, "p"]),
        ("--reference moving", [None, None]),
        ("--ref_pretrain r", ["r", "r"]),
    ],
)
def test_the_reference_is_the_start_or_moves(flags: str, references: list[str | None]) -> None:
    words = f"--pretrain p --prompt_data d --save run --method iterative_dpo {flags}".split()
    config, _ = parse(IterateConfig, words, "iterate")
    found = [train_config(config, number, "m", dataset="s") for number in (1, 2)]
    assert all(isinstance(each, DPOConfig) and to_dict(each)["prompt_key"] == "prompt" for each in found)
    assert [each.ref_pretrain for each in found] == references


@pytest.fixture
def place(tmp_path: Path) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 42}))
    (tmp_path / "d.jsonl").write_text("{}\n")
    return str(tmp_path)


ITERATE = "--pretrain {} --prompt_data {}/d.jsonl --save {}/run --reward_rule math --method "


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("rejection_sampling --n_samples_per_prompt 1", "n_samples_per_prompt=1 with method=rejection_sampling"),
        ("rejection_sampling --reference moving", "reference=moving is ignored"),
        ("rejection_sampling --beta 0.3", "beta=0.3 is ignored with method=rejection_sampling"),
        ("rejection_sampling --eval_split test", "eval_split=test has nothing to evaluate on: set eval_data"),
        ("rejection_sampling --eval_split 1.5", "eval_split=1.5 must be above 0 and below 1 as a part of the data"),
        ("rejection_sampling --csft_prompt a", "csft_prompt='a' is ignored"),
        ("rejection_sampling --normalize_reward", "normalize_reward=True is ignored"),
        ("rejection_sampling --normalize_reward --reward_pretrain {}", "needs mean and std in config.json"),
        ("rejection_sampling --reward_pretrain {}/no", "reward_pretrain={}/no is not a local directory"),
        ("rejection_sampling --reward_tensor_model_parallel_size 2", "is ignored without reward_pretrain"),
        (
            "rejection_sampling --reward_pretrain {} --reward_tensor_model_parallel_size 3",
            "reward_tensor_model_parallel_size=3 does not divide",
        ),
        ("conditional_sft --reward_template {input}", "reward_template='{input}' must hold"),
        ("iterative_dpo --lora_rank 4", "reference=fixed with lora_rank=4"),
        ("iterative_dpo --ref_pretrain {} --reference moving", "with reference=moving: leave one out"),
        ("iterative_dpo --enable_ema", "enable_ema=True is ignored"),
        ("iterative_dpo --max_untrained_steps 5", "max_untrained_steps is ignored"),
        ("iterative_dpo --num_rounds 0", "num_rounds=0 must be at least 1"),
        ("iterative_dpo --max_len 9999", "max_len = 9999 is above max_position_embeddings=4096"),
        ("iterative_dpo --generate_max_len 9999", "= 11023 is above max_position_embeddings=4096"),
        ("iterative_dpo --label_smoothing 0.1 --ipo", "label_smoothing=0.1 with ipo=True"),
        ("iterative_dpo --tensor_model_parallel_size 3", "tensor_model_parallel_size=3 does not divide"),
        ("iterative_dpo --eval_data {}/no.jsonl", "no.jsonl"),
        ("iterative_dpo --reward_format a", "reward_format='a' is ignored"),
    ],
)
def test_mistakes_of_a_loop_and_its_stages_are_told(flags: str, said: str, place: str) -> None:
    def errors(text: str) -> list[str]:
        words = text.replace("{}", place).split()
        return check_iterate(parse(IterateConfig, words, "iterate")[0])

    for sound in ("", " --eval_split 0.03", " --eval_data {}/d.jsonl --eval_split test"):
        assert errors(ITERATE + flags.split()[0] + sound) == []
    found = errors(ITERATE + flags)
    assert any(said.replace("{}", place) in error for error in found), found
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        (GenerateConfig, "--pretrain {} --prompt_data {}/d.jsonl --output {}/o.txt", "must end in .jsonl"),
        (GenerateConfig, "--pretrain {} --prompt_data {}/d.jsonl --output o.jsonl --top_p 1.5", "top_p=1.5"),
        (GenerateConfig, "--pretrain {} --prompt_data {}/d.jsonl --output o.jsonl --iter -1", "iter=-1"),
        (
            GenerateConfig,
            "--pretrain {} --prompt_data {}/d.jsonl --output o.jsonl --greedy --n_samples_per_prompt 2",
            "n_samples_per_prompt=2 with greedy=True",
        ),
        (ScoreConfig, "--dataset {}/d.jsonl --output {}/d.jsonl --reward_rule math", "is dataset too"),
        (ScoreConfig, "--dataset {}/d.jsonl --output {}/o.jsonl", "nothing scores"),
        (SelectConfig, "--dataset {}/d.jsonl --output {}/o.jsonl --post_processor rs --normalize_reward", "is ignored"),
        (SelectConfig, "--dataset {}/x.jsonl --output {}/o.jsonl --post_processor rs", "x.jsonl"),
    ],
)
def test_mistakes_of_the_other_programs(kind: Any, flags: str, said: str, place: str) -> None:
    check: Any = {GenerateConfig: check_generate, ScoreConfig: check_score, SelectConfig: check_select}[kind]
    found = check(parse(kind, flags.replace("{}", place).split(), "x")[0])
    assert any(said in error for error in found), found
