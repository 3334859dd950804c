"""Tokenizers load with their stop tokens; what is wrong is said in terms of the flags."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.tokenizer import load_tokenizer, stop_token_ids


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


def test_refuses_what_cannot_be_loaded(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_chat_template"):
        load_tokenizer(str(model_dir), chat_template="{% for %}")
    (model_dir / "tokenizer.json").write_text("{}")
    for path in (model_dir, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"tokenizer={path} cannot be loaded"):
            load_tokenizer(str(path), chat_template=None)


@pytest.mark.parametrize(("listed", "expected"), [(None, [1]), (4, [1, 4]), ([4, 1, 3], [1, 3, 4])])
def test_stop_tokens_join_both_sources(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, listed: object, expected: list[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert stop_token_ids(tokenizer, str(tmp_path)) == expected


def test_stop_tokens_without_generation_config_or_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert stop_token_ids(tokenizer, str(tmp_path)) == [1]
    with pytest.raises(ValueError, match="pretrain="):
        stop_token_ids(tokenizer, str(tmp_path / "absent"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="eos_token_id='</s>'"):
        stop_token_ids(tokenizer, str(tmp_path))
