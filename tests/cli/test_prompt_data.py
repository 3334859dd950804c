"""The prompts of an RL run from its command line: mixtures, kinds, splits, messages, evaluation sets; and going on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from megarlhf.cli.prompt_data import load_data
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo
from megarlhf.config.command_line import parse
from megarlhf.data.prompts import PromptData
from megarlhf.data.types import Prompt, Rollout
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import rl
from megarlhf.trainers.state import LoopState
from tests.trainers.plain_roles import PlainRoles, make_config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(letter: str, count: int) -> list[dict[str, str]]:
    return [{"input": f"{letter}{i}", "label": str(i)} for i in range(count)]


def config_of(assets: Path, **options: Any) -> PPOConfig:
    given = {"pretrain": assets / "model", "save": assets.parent / "none", "reward_rule": "math"} | options
    words = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in given.items()]
    return parse(PPOConfig, words, "ppo")[0]


def loaded(assets: Path, **options: Any) -> tuple[PromptData, dict[str, list[Prompt]]]:
    config = config_of(assets, **options)
    named = ("prompt_data", "eval_data", "eval_split", "input_template")
    assert [error for error in check_ppo(config) if error.startswith(named)] == []
    return load_data(config)[:2]


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_several_data_sets_by_their_probabilities(assets: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in (("a", 9), ("b", 5))]
    both = ",".join(map(str, files))
    parts = [datasets.Dataset.from_list(rows(name, count)) for name, count in (("a", 9), ("b", 5))]
    expected = datasets.interleave_datasets(parts, [0.75, 0.25], seed=7, stopping_strategy="first_exhausted")["input"]
    data, _ = loaded(assets, prompt_data=both, prompt_data_probs="0.6,0.2", seed=7)
    assert texts(data.prompts) == list(expected) and texts(data.prompts) != sorted(texts(data.prompts))
    assert [prompt.index for prompt in data.prompts] == list(range(len(expected)))
    data, _ = loaded(assets, prompt_data=both)
    assert texts(data.prompts) == [f"a{i}" for i in range(9)] + [f"b{i}" for i in range(5)]
    assert loaded(assets, prompt_data=both, prompt_data_probs="0.6,0.2", seed=8)[0].fingerprint != data.fingerprint


def test_openrlhfs_default_probability_of_one_data_set(
    assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", rows("a", 3))
    assert texts(loaded(assets, prompt_data=file, prompt_data_probs="1.0")[0].prompts) == ["a0", "a1", "a2"]
    assert "no more rows" not in caplog.text
    errors = check_ppo(config_of(assets, prompt_data=f"{file},{file}", prompt_data_probs="1.0"))
    assert any(error.startswith("prompt_data_probs=1.0 has 1 numbers for the 2 data sets") for error in errors)


def test_kinds_and_splits_of_a_directory(assets: Path, tmp_path: Path) -> None:
    for split, letter in (("train", "t"), ("test", "h"), ("hard", "x")):
        write(tmp_path / "d" / f"{split}-00000-of-00001.jsonl", rows(letter, 2))
    (tmp_path / "d" / "train-00000-of-00001.csv").write_text("input,label\nc,1\n")
    data, sets = loaded(
        assets,
        **{"prompt_data": f"json@{tmp_path}/d", "prompt_split": "hard"},
        **{"eval_data": f"json@{tmp_path}/d,mine=json@{tmp_path}/d", "eval_split": "test"},
    )
    assert texts(data.prompts) == ["x0", "x1"]
    assert {name: texts(members) for name, members in sets.items()} == {"d": ["h0", "h1"], "mine": ["h0", "h1"]}


def test_messages_of_a_chat(assets: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}]
    file = write(tmp_path / "chats.jsonl", [{"turns": chat, "label": "1"}, {"turns": chat[:1], "label": "2"}])
    options = {"input_key": "turns", "apply_chat_template": True, "tokenizer_chat_template": TEMPLATE}
    data, sets = loaded(assets, prompt_data=file, eval_data=f"chats={file}", **options)
    assert texts(data.prompts) == ["u 12 a 3 u 4 a ", "u 12 a "] == texts(sets["chats"])
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    expected = tokenizer("u 12 a 3 u 4 a ", add_special_tokens=False).input_ids
    assert data.prompts[0].token_ids.tolist() == expected


@pytest.mark.parametrize(
    ("eval_data", "expected"),
    [
        ("{}/a.jsonl", {"": "a"}),
        ("m-1={}/a.jsonl", {"m-1": "a"}),
        ("{}/a.jsonl,{}/b.jsonl", {"a": "a", "b": "b"}),
        ("x={}/a.jsonl, {}/b.jsonl", {"x": "a", "b": "b"}),
        ("{}/x=1.jsonl", {"": "e"}),
    ],
)
def test_names_of_evaluation_sets(assets: Path, tmp_path: Path, eval_data: str, expected: dict[str, str]) -> None:
    for name, letter in (("a", "a"), ("b", "b"), ("x=1", "e")):
        write(tmp_path / f"{name}.jsonl", rows(letter, 1))
    given = eval_data.replace("{}", str(tmp_path))
    _, sets = loaded(assets, prompt_data=tmp_path / "a.jsonl", eval_data=given)
    assert {name: members[0].text[0] for name, members in sets.items()} == expected


@pytest.mark.parametrize(
    ("eval_data", "said"),
    [
        ("{}/a.jsonl,{}/other/a.jsonl", "has two sets of the name a: give names"),
        ("m={}/a.jsonl,m={}/b.jsonl", "has two sets of the name m"),
        ("a b={}/a.jsonl", "the name 'a b' takes letters"),
        ("m={}/none.jsonl", "none.jsonl does not exist here"),
        ("{}/a.jsonl,m=yaml@{}", "the type before @ is"),
    ],
)
def test_what_is_wrong_with_names_of_sets(assets: Path, tmp_path: Path, eval_data: str, said: str) -> None:
    for name in ("a", "b", "other/a"):
        write(tmp_path / f"{name}.jsonl", rows("a", 1))
    given = eval_data.replace("{}", str(tmp_path))
    errors = check_ppo(config_of(assets, prompt_data=tmp_path / "a.jsonl", eval_data=given))
    assert sum(said in error and error.startswith("eval_data=") for error in errors) == 1


def test_a_run_that_goes_on_draws_the_same_of_a_mixture(assets: Path, tmp_path: Path) -> None:
    class Noting(PlainRoles):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[str] = []

        def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
            self.drawn += texts(prompts)
            return super().generate(prompts, step=step, first_place=first_place)

    files = [write(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in (("a", 4), ("b", 6))]
    options = {"prompt_data": ",".join(map(str, files)), "prompt_data_probs": "0.5,0.5", "seed": 11}

    def train(save: Path, plain: Noting, state: dict[str, Any] | None) -> Noting:
        config = make_config(save, batch={"train_iters": 6}, logging={"save_interval": 1})
        loop = LoopState.fresh(config.algorithm)
        if state is not None:
            loop.restore(json.loads(json.dumps(state)))
        sinks = Sinks(save, total_steps=6, resumed_step=loop.step or None)
        rl.train(config, plain.roles(critic=True), loaded(assets, **options)[0], {}, loop, sinks, lambda: False)
        sinks.close()
        return plain

    whole = train(tmp_path / "whole", Noting(), None)
    assert {text[0] for text in whole.drawn} == {"a", "b"} and len(whole.drawn) == 24
    for step in (1, 4):  # within an epoch, and across the ends of several
        rest = train(tmp_path / f"rest{step}", Noting(), whole.saved[step])
        assert rest.drawn == whole.drawn[4 * step :]
