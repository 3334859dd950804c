"""Bad data ends every program with status 2 and a sentence that names file and row, before any model is loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import run_supervised
from megarlhf.cli.main import main

Row = dict[str, Any]
GOOD: dict[str, Row] = {
    "sft": {"input": "1 =", "output": "2"},
    "kd": {"input": "1 =", "output": "2"},
    "rm": {"prompt": "1 =", "chosen": "2", "rejected": "3"},
    "dpo": {"prompt": "1 =", "chosen": "2", "rejected": "3"},
    "kto": {"input": "1 =", "output": "2", "label": 1},
    "prm": {"input": "1z2z", "label": ["y", "n"]},
}
SECOND = {"kto": {"input": "3 =", "output": "4", "label": False}}  # the KL asks for another prompt's answer
OWN = {
    "sft": ["--output_key", "output"],
    "kd": ["--teacher_model", "{model}"],
    "rm": ["--prompt_key", "prompt"],
    "dpo": ["--prompt_key", "prompt"],
    "kto": ["--output_key", "output"],
    "prm": ["--placeholder_token", "z", "--reward_tokens", "y", "n"],
}
CHAT = ["--tokenizer", "{chat}", "--apply_chat_template"]
PLACE = "row 2 (line 3) of {}: "
LINE = "data path={}, line 3: it "
FIRST = {name: next(iter(row)) for name, row in GOOD.items()} | {"kto": "label"}  # the column that is looked for first
EVERY: list[tuple[str | Row, list[str], str]] = [  # third line, flags, what is said
    ({"x": 1}, [], PLACE + "{first} is not there; the keys are 'x': set "),
    ({}, [], PLACE + "{first} is not there; the keys are none, for the row is empty"),
    ("null", [], LINE + "is a NoneType, not an object with named fields"),
    ("not JSON\n", [], LINE + "is not JSON: Expecting value"),
    (
        '{"input": "1", "lab',
        [],
        LINE + "is not JSON: Unterminated string starting at: line 1 column 16 (char 15) (the file "
        "ends in this line: was it cut off?)",
    ),
    ("", ["--apply_chat_template"], "tokenizer={model} has no chat template: set tokenizer_chat_template"),
    ("", ["--lora_rank", "2", "--target_modules", "q_prj", "v_proj"], "target_modules=q_prj; this model has no such"),
    ("", ["--train_split", "trian"], "{} holds the splits train; not trian"),
    ("", ["--max_len", "1"], "max_len=1 drops all 2 rows of {}, the shortest of which has "),
    ("", ["--eval_dataset", "{broken}"], "data path={broken}, line 1: it is not JSON"),
]
ENDLESS = [(name, "", ["--tokenizer", "{endless}"], "tokenizer={endless} has no EOS") for name in GOOD if name != "prm"]
SINGLE: list[tuple[str, str | Row | None, list[str], str]] = [  # a third line of None: no lines
    ("sft", None, [], "data path={} has no rows"),
    ("sft", {"input": "1", "output": ""}, [], PLACE + "output_key=output is empty: remove the row"),
    ("sft", {"input": "", "output": "1"}, [], PLACE + "its prompt is empty: remove the row"),
    ("sft", {"input": "1", "output": ""}, CHAT, PLACE + "output_key=output: the last message is empty"),
    ("sft", {"input": 5, "output": "1"}, [], PLACE + "its prompt holds a int, not a string"),
    ("sft", "", ["--eval_split", "0.5", "--max_samples", "1"], "{} has 1 different rows, of which"),
    (
        "sft",
        "",
        [*CHAT, "--input_key", "input", "--output_key", "none"],
        "a whole chat ends with the assistant's message",
    ),
    ("kd", {"input": "1", "output": None}, [], PLACE + "output_key=output has no value"),
    (
        "rm",
        {"prompt": "1", "chosen": ["a"], "rejected": "b"},
        [],
        PLACE + "chosen_key=chosen holds a list, not a string",
    ),
    (
        "rm",
        "",
        ["--margin_loss"],
        "row 0 (line 1) of {}: margin=None is not a number: correct it, or leave out margin_loss",
    ),
    ("dpo", {"prompt": "", "chosen": "1", "rejected": "2"}, [], PLACE + "its prompt is empty"),
    ("dpo", {"prompt": "1", "chosen": "", "rejected": "2"}, [], PLACE + "chosen_key=chosen is empty: remove the row"),
    ("rm", {"prompt": "1", "chosen": "1", "rejected": ""}, CHAT, PLACE + "rejected_key=rejected: the last message is"),
    ("kto", {"input": "1", "output": "", "label": 1}, [], PLACE + "output_key=output is empty: remove the row"),
    ("kto", {"input": "1", "output": "2", "label": 5}, [], PLACE + "label_key=label holds 5: a label is 1, 0, true or"),
    ("kto", "", ["--max_samples", "1"], "{}: for none of 1 rows an answer to another prompt differs from those to"),
    (
        "prm",
        {"input": "1z2z", "label": ["y"]},
        [],
        PLACE + "label_key=label has 1 labels, and the text 2 tokens placeholder_token='z'",
    ),
    ("prm", {"input": "12", "label": []}, [], PLACE + "label_key=label has 0 labels, and the text 0 tokens"),
    ("prm", {"input": "1z", "label": ["x"]}, [], PLACE + "label_key=label: 'x' is none of reward_tokens=y n"),
    ("prm", {"input": "1z", "label": [1.5]}, [], PLACE + "label_key=label: 1.5 is neither a reward token nor"),
    ("prm", "", ["--placeholder_token", "zz"], "placeholder_token='zz' is 2 tokens of tokenizer={model}"),
]
CASES = [(name, line, flags, said) for name in GOOD for line, flags, said in EVERY] + ENDLESS + SINGLE


@pytest.fixture
def names(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Models and tokenizers by the names that cases give them; a rank that starts is an error."""

    def forbidden(*_: object) -> int:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(run_supervised, "_run_rank", forbidden)
    for name in ("endless", "chat"):
        shutil.copytree(assets / "model", tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((tmp_path / "endless" / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    (tmp_path / "broken.jsonl").write_text("not JSON\n")
    found = {name: str(tmp_path / name) for name in ("endless", "chat")}
    return found | {"model": str(assets / "model"), "broken": str(tmp_path / "broken.jsonl")}


def put_in(text: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def fail(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a program that is to refuse; what it says."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(("program", "line", "flags", "said"), CASES)
def test_bad_rows(
    names: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str,
    line: str | Row | None,
    flags: list[str],
    said: str,
) -> None:
    path, good = tmp_path / "rows.jsonl", GOOD[program]
    third = json.dumps(line) if isinstance(line, dict) else line
    path.write_text("" if third is None else f"{json.dumps(good)}\n{json.dumps(SECOND.get(program, good))}\n{third}")
    given = ["--pretrain", names["model"], "--dataset", str(path), "--save", str(tmp_path / "run"), "--max_len", "16"]
    words = [program, *given, "--global_batch_size", "1", *OWN[program], *flags]
    first = f"{FIRST[program]}_key={FIRST[program]}"
    expected = put_in(said.replace("{first}", first).replace("{}", str(path)), names)
    found = fail([put_in(word, names) for word in words], capsys)
    assert expected in found and found.count(f"megarlhf {program}: error:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["rm", "dpo"])
def test_equal_pairs_are_dropped_and_counted(
    names: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    equal = GOOD[program] | {"rejected": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD[program], equal, equal)))
    given = ["--pretrain", names["model"], "--dataset", str(path), "--save", str(tmp_path / "run"), "--max_len", "16"]
    words = [program, *given, "--global_batch_size", "1", *OWN[program]]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "training: 1 rows (2 sequences), " in said and "2 rows dropped: 2 with chosen equal to rejected" in said
    assert "\n1 optimizer steps, 1 epochs\n" in said
    assert main([*words, "--dry-run", "--train_iters", "3"]) == 0
    assert "\n3 optimizer steps, 3 epochs (train_iters; max_epochs=1 does not count)\n" in capsys.readouterr().out
    path.write_text(json.dumps(equal) + "\n")
    assert f"{path}: each of its 1 rows is one with chosen equal to rejected" in fail(words, capsys)


def cut(suffix: str, num_bytes: int) -> Callable[[str], None]:
    """Take bytes from the end of one of the two files."""
    return lambda prefix: os.truncate(prefix + suffix, os.path.getsize(prefix + suffix) - num_bytes)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut(".bin", 2), "{}.bin has 1358 bytes and {}.idx tells of 1360"),
        (cut(".idx", 8), "{}.idx has 234 bytes and its head tells of 242"),
        (lambda prefix: os.remove(prefix + ".bin"), "data_path={} has no file {}.bin"),
    ],
)
def test_indexed_data_that_is_not_whole(
    names: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[str], None],
    said: str,
) -> None:
    (tmp_path / "corpus.jsonl").write_text((json.dumps({"text": "1234567" * 9 + "1234"}) + "\n") * 10)
    tokens = ["--tokenizer_type", "HuggingFaceTokenizer", "--tokenizer_model", names["model"], "--append_eod"]
    given = ["--input", str(tmp_path / "corpus.jsonl"), "--output_prefix", str(tmp_path / "a"), "--workers", "1"]
    assert main(["preprocess", *given, *tokens]) == 0
    prefix = str(tmp_path / "a_text_document")
    damage(prefix)
    words = ["sft", "--pretrain", names["model"], "--data_path", prefix, "--pretrain_mode", "--max_len", "16"]
    found = fail([*words, "--save", str(tmp_path / "run"), "--split", "1,0,0"], capsys)
    assert said.replace("{}", prefix) in found
