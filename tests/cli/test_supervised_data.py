"""From a supervised run's options to its rows: what is kept of an earlier run, and what is held out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import supervised_data
from megarlhf.cli.run import resolved_files
from megarlhf.cli.supervised_data import data_loaders, data_sources, load_data
from megarlhf.config.command_line import from_dict
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, SFTConfig
from megarlhf.data.supervised import SupervisedData, data_lines, rows_in_both
from megarlhf.data.tokenizer import load_tokenizer

Options = dict[str, Any]


@pytest.fixture
def options(assets: Path, tmp_path: Path) -> Options:
    rows = [{"input": f"{i}", "output": str(i % 7), "score": f"{i / 7:.2f}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{"pretrain": str(assets / "model"), "dataset": str(tmp_path / "rows.jsonl"), "save": str(tmp_path / "run")},
        **{"output_key": "output", "max_len": 16, "data_cache_path": str(tmp_path / "cache")},
    }


def load(options: Options) -> list[SupervisedData]:
    config = from_dict(SFTConfig, options)
    return [load_data(config, source) for source in data_sources(config)]


def test_what_changes_rows_is_tokenized_again_and_nothing_else(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, real = [], supervised_data.load_sft_rows
    monkeypatch.setattr(supervised_data, "load_sft_rows", lambda *a, **b: calls.append(1) or real(*a, **b))
    first = load(options)[0]
    assert "tokenized data of" in capsys.readouterr().err and len(calls) == 1
    for same in ({}, {"save": "elsewhere", "learning_rate": 1.0, "num_gpus_per_node": 2, "max_epochs": 9, "seed": 1}):
        assert load(options | same)[0].fingerprint == first.fingerprint and len(calls) == 1
    (tmp_path / "eval.jsonl").write_text('{"input": "9", "output": "9"}\n')
    assert load(options | {"micro_batch_size": 3, "eval_dataset": str(tmp_path / "eval.jsonl")}) and len(calls) == 2
    changes = [{"max_len": 15}, {"pretrain_mode": True}, {"input_template": "{}="}, {"max_samples": 5}]
    changes += [{"dataset_probs": "1", "seed": seed} for seed in (1, 2)]
    for number, change in enumerate(changes):
        load(options | change)
        assert len(calls) == number + 3, change
    (tmp_path / "rows.jsonl").write_text('{"input": "9", "output": "9"}\n')
    assert len(load(options)[0].rows) == 1 and len(calls) == len(changes) + 3


def test_options_of_a_loss_leave_pairs_as_they_are_but_for_the_margin(options: Options, tmp_path: Path) -> None:
    row = {"prompt": "1", "chosen": "2", "rejected": "3", "margin": 0.5}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given = {name: value for name, value in options.items() if name != "output_key"} | {"prompt_key": "prompt"}
    for number, (config, more) in enumerate([(DPOConfig, {"beta": 0.5}), (RMConfig, {"value_head_prefix": "v"})], 1):
        for change in ({}, more):
            (source,) = data_sources(from_dict(config, given | change))
            load_data(from_dict(config, given | change), source)
        assert len(list((tmp_path / "cache").iterdir())) == number
    found = load_data(from_dict(RMConfig, given | {"margin_loss": True}), source)
    assert found.rows.scalars["margin"].tolist() == [0.5, 0.5]


def test_labels_far_from_balanced_are_told_each_time(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of training data only."""
    rows = [{"input": f"{i}", "output": f"{i}", "label": 1} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = from_dict(KTOConfig, options | {"eval_dataset": str(tmp_path / "eval.jsonl")})
    for _ in range(2):
        for source in data_sources(config):
            load_data(config, source)
        assert capsys.readouterr().err.count("warning: 2 desirable answers") == 1


@pytest.mark.parametrize("indexed", [False, True])
def test_a_teacher_of_other_tokens_is_told_for_any_data(options: Options, tmp_path: Path, indexed: bool) -> None:
    shutil.copytree(options["pretrain"], tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(options["pretrain"], chat_template=None)
    tokenizer.add_tokens(["<teacher>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    given = options | ({"dataset": "", "data_path": [str(tmp_path / "none")]} if indexed else {})
    config = from_dict(KDConfig, given | {"teacher_model": str(tmp_path / "teacher")})
    with pytest.raises(ValueError, match="teacher_model=.*differs from .* in 1 tokens .'<teacher>'"):
        data_loaders(config)[0]()


def test_rows_of_a_process_reward_model_have_no_eos(options: Options, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "1z2", "label": ["y"]}\n')
    given = {name: value for name, value in options.items() if name != "output_key"}
    config = from_dict(PRMConfig, given | {"placeholder_token": "z", "reward_tokens": ["y", "n"]})
    (source,) = data_sources(config)
    tokenizer = load_tokenizer(options["pretrain"], chat_template=None)
    assert tokenizer.decode(load_data(config, source).rows.input_ids[-1:]) == "2"
    assert "end of every row" not in resolved_files(config.model, config.data)


@pytest.mark.parametrize("cache", [True, False])
def test_a_part_is_held_out_of_training(options: Options, cache: bool) -> None:
    kept = {} if cache else {"data_cache_path": None}
    for _ in range(2):
        training, evaluation = load(options | {"eval_split": "0.1"} | kept)
        assert (len(training.rows), len(evaluation.rows)) == (36, 4)
        assert rows_in_both(training.rows, evaluation.rows) == 0
        assert "trained on too" not in data_lines(training, evaluation)


def test_what_is_trained_and_evaluated_on_is_counted(options: Options, tmp_path: Path) -> None:
    """OpenRLHF 0.5 evaluates on the first 3% of the training data."""
    rows = [{"input": "3", "output": "3"}, {"input": "3", "output": "4"}, {"input": "12345678901234567", "output": "1"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, evaluation = load(options | {"eval_dataset": str(tmp_path / "eval.jsonl")})
    assert rows_in_both(training.rows, evaluation.rows) == 1
    first, second, warning = data_lines(training, evaluation).split("\n")
    tokens = int(training.rows.lengths.sum())
    assert first.startswith(f"training: 40 rows, {tokens} tokens, ") and first.endswith("0 rows dropped")
    assert second.endswith("1 rows dropped: 1 longer than max_len=16")
    assert warning.startswith("warning: 1 of 2 evaluation rows are trained on too")


def test_splits_of_the_training_data(options: Options, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    for split, number in (("train", 3), ("test", 2)):
        lines = [json.dumps({"input": f"{split[-1]}{i}", "output": "1"}) + "\n" for i in range(number)]
        (tmp_path / "sets" / f"{split}.jsonl").write_text("".join(lines))
    given = options | {"dataset": f"json@{tmp_path / 'sets'}"}
    training, evaluation = load(given | {"eval_split": "test"})
    assert (len(training.rows), len(evaluation.rows)) == (3, 2)
    assert len(load(given)) == 1
    with pytest.raises(ValueError, match="holds the splits train; not test"):
        load(options | {"eval_split": "test"})
