"""Tokenizers load with their stop tokens; what is wrong is said in terms of the flags."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from megarlhf.data.tokenizer import (
    check_same_vocabulary,
    load_tokenizer,
    special_token_in,
    stop_tokens,
    template_source,
)


@pytest.fixture
def model_dir(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_loads_with_own_or_other_template(model_dir: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    own = load_tokenizer(str(model_dir), chat_template=None)
    assert own.apply_chat_template(chat, tokenize=False) == "<s><|user|>hi</s>\n"
    other = load_tokenizer(str(model_dir), chat_template="{{ messages[0]['content'] }}!")
    assert other.apply_chat_template(chat, tokenize=False) == "hi!"


def test_a_template_is_read_from_a_file_or_taken_as_text(model_dir: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }} é?", encoding="utf-8")
    of_file = load_tokenizer(str(model_dir), chat_template=str(tmp_path / "mine.jinja"))
    assert of_file.apply_chat_template(chat, tokenize=False) == "hi é?"
    for text in ("{{ messages[0]['content'] }}" + " " * 5000, "{{ messages[0]['content'] }}\0"):  # no paths at all
        of_text = load_tokenizer(str(model_dir), chat_template=text)
        assert of_text.apply_chat_template(chat, tokenize=False).rstrip(" \0") == "hi"


def test_a_template_by_the_name_that_the_tokenizer_gives_it(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    several = load_tokenizer(str(model_dir), chat_template=None)
    several.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages[0]['content'] }}!"}
    several.save_pretrained(model_dir)
    named = load_tokenizer(str(model_dir), chat_template="tool_use")
    assert named.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_a_template_that_is_neither_file_nor_text_is_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes("{{ messages }} é".encode("latin-1"))
    (tmp_path / "t.json").write_text('{"chat_template": "{{ messages }}"}')
    for given, said in (
        ("mine.jinja", "looks like a path .* and cannot be read .*No such file"),
        (str(tmp_path), "looks like a path .*Is a directory"),
        ("", "looks like a path"),
        (str(tmp_path / "latin.jinja"), "is not UTF-8 text"),
        (str(tmp_path / "t.json"), "is a JSON file"),
    ):
        with pytest.raises(ValueError, match=f"tokenizer_chat_template={given} {said}"):
            load_tokenizer(str(model_dir), chat_template=given)


def test_refuses_what_cannot_be_loaded(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "tokenizer.json").write_text("{}")
    for path in (model_dir, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"tokenizer={path} cannot be loaded"):
            load_tokenizer(str(path), chat_template=None)


def config_of(directory: Path, **changes: Any) -> PretrainedConfig:
    LlamaConfig(**({"vocab_size": 50, "eos_token_id": 2} | changes)).save_pretrained(directory)
    return AutoConfig.from_pretrained(directory)


GENERATION: list[tuple[Any, dict[int, tuple[str, ...]]]] = [
    (None, {1: ("tokenizer",), 2: ("config.json",)}),  # no such file
    ({}, {1: ("tokenizer",)}),
    ({"eos_token_id": None}, {1: ("tokenizer",)}),
    ({"eos_token_id": 4}, {1: ("tokenizer",), 4: ("generation_config.json",)}),
    (
        {"eos_token_id": [4, 1, 3, 4]},
        {1: ("tokenizer", "generation_config.json"), 3: ("generation_config.json",), 4: ("generation_config.json",)},
    ),
]


@pytest.mark.parametrize(("generation", "expected"), GENERATION)
@pytest.mark.parametrize("listed", [2, [2, 6]])
def test_stop_tokens_are_those_of_vllm(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    generation: Any,
    expected: dict[int, tuple[str, ...]],
    listed: Any,
) -> None:
    config = config_of(tmp_path, eos_token_id=listed)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    elif listed != 2:
        expected = expected | {6: ("config.json",)}
    stops = stop_tokens(tokenizer, str(tmp_path), config)
    assert {stop.token_id: stop.sources for stop in stops} == expected
    assert [stop.text for stop in stops][:2] == [repr(tokenizer.convert_ids_to_tokens(s.token_id)) for s in stops][:2]
    assert [stop.token_id for stop in stops] == sorted(expected)
    # What vLLM stops at: SamplingParams.update_from_generation_config adds these to the tokenizer's EOS.
    try:
        model = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    except OSError:
        model = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id
    models = set(model if isinstance(model, list) else [] if model is None else [model])
    assert {stop.token_id for stop in stops} == models | {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id='</s>' is not an integer"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id=\[1, True\] is not an integer"),
        ('{"eos_token_id": 2.0}', "eos_token_id=2.0 is not an integer"),
        ("{", "generation_config.json cannot be read as JSON"),
        ("", "generation_config.json cannot be read as JSON"),
        ("[1]", "generation_config.json holds no JSON object"),
        ("null", "generation_config.json holds no JSON object"),
        ('{"eos_token_id": [50, 1, 70]}', "vocab_size=50 of pretrain leaves out the stop tokens 50 'N' .*, 70 'b' "),
        ('{"eos_token_id": -1}', "leaves out the stop tokens -1 None"),
        ('{"eos_token_id": 99999999999}', "leaves out the stop tokens 99999999999 None"),
    ],
)
def test_stop_tokens_that_cannot_be_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str, said: str
) -> None:
    config = config_of(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        stop_tokens(tokenizer, str(tmp_path), config)


def test_no_stop_token_at_all_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no EOS and .*generation_config.json names none"):
        stop_tokens(endless, str(tmp_path), config_of(tmp_path))


def test_the_tokenizers_eos_must_be_a_token_of_the_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = config_of(tmp_path, vocab_size=1, eos_token_id=None)
    with pytest.raises(ValueError, match=r"vocab_size=1 of pretrain leaves out the stop tokens 1 '</s>' \(tokenizer\)"):
        stop_tokens(tokenizer, str(tmp_path), config)


def test_the_source_of_a_template_is_told(tmp_path: Path) -> None:
    assert template_source(str(tmp_path), None) == f"{tmp_path}/tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text("")
    assert template_source(str(tmp_path), None) == f"{tmp_path}/chat_template.jinja"
    assert template_source(str(tmp_path), "mine.jinja") == "tokenizer_chat_template=mine.jinja"
    assert template_source(str(tmp_path), "{{ a }}\n{{ b }}") == "tokenizer_chat_template=(its text)"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["7", None, 7.5, ["a"]], None),
        (["7", "8<|end|>"], "<|end|>"),
        ([1, ["x", {"answer": "<|user|>7"}]], "<|user|>"),
        (["<|other|>"], None),
        ([], None),
    ],
)
def test_special_tokens_in_labels(tokenizer: PreTrainedTokenizerBase, labels: list[Any], expected: str | None) -> None:
    assert special_token_in(labels, tokenizer) == expected


def test_a_teacher_has_the_same_tokens(tokenizer: PreTrainedTokenizerBase, model_dir: Path, tmp_path: Path) -> None:
    """An added token is told, and a directory without a tokenizer, with what to do."""
    check_same_vocabulary(tokenizer, str(model_dir))
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<teacher>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs from .* in 1 tokens \\('<teacher>' is [0-9]+, not None\\)"):
        check_same_vocabulary(tokenizer, str(tmp_path / "other"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none has no tokenizer to compare with the student's: copy its files"):
        check_same_vocabulary(tokenizer, str(tmp_path / "none"))
