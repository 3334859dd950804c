"""Digests of what was loaded, and tokens that the model has no embedding for."""

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.prompts import PromptData
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Prompt, training_rows
from tests.data.test_prompts import load as load_prompt_file
from tests.data.test_sft import load as load_sft_file

Write = Callable[[list[Any]], str]


def prompt_data(*rows: tuple[tuple[int, ...], Any]) -> PromptData:
    prompts = [
        Prompt(index=i, text="", token_ids=np.array(ids, dtype=np.int32), label=label)
        for i, (ids, label) in enumerate(rows)
    ]
    return PromptData(prompts=prompts, num_dropped=0)


def sft_data(*rows: tuple[tuple[int, ...], int]) -> SupervisedData:
    return SupervisedData(rows=training_rows([ids for ids, _ in rows], [length for _, length in rows]))


def test_digest_is_of_lengths_tokens_and_labels() -> None:
    """Byte for byte, so that it is the same on every machine."""
    wanted = hashlib.blake2b(struct.pack("<qqq", 2, 3, 4) + struct.pack("<iiii", 5, 300, 70000, 1), digest_size=16)
    wanted.update(b'["7", {"a": [1, null], "b": "\\u00e9"}]')
    data = prompt_data(((5, 300, 70000), "7"), ((1,), {"b": "é", "a": [1, None]}))
    assert data.fingerprint == wanted.hexdigest()


def test_digest_differs_with_every_token_label_order_and_number() -> None:
    variants = [
        prompt_data(((5, 3), "7"), ((1,), None)),
        prompt_data(((5, 4), "7"), ((1,), None)),
        prompt_data(((5,), "7"), ((3, 1), None)),
        prompt_data(((3, 5), "7"), ((1,), None)),
        prompt_data(((1,), "7"), ((5, 3), None)),
        prompt_data(((5, 3), None), ((1,), "7")),
        prompt_data(((5, 3), 7), ((1,), None)),
        prompt_data(((5, 3), [7]), ((1,), None)),
        prompt_data(((5, 3), True), ((1,), None)),
        prompt_data(((5, 3), "7")),
        prompt_data(((5, 3), "7"), ((1,), None), ((1,), None)),
        sft_data(((5, 3), 1), ((1, 2, 3), 1)),
        sft_data(((5, 3), 1), ((1, 2, 3), 2)),
        sft_data(((1, 2, 3), 1), ((5, 3), 1)),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)
    assert variants[0].fingerprint == prompt_data(((5, 3), "7"), ((1,), None)).fingerprint


def test_prompts_with_tokens_past_the_vocabulary_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in "xyz"}
    assert ids["x"] < ids["y"] < ids["z"]
    path = write_jsonl([{"input": "abc"}, {"input": "az"}, {"input": "zy"}, {"input": "x" * 50}])
    for size in (ids["z"] + 1, ids["z"] + 100):  # a tokenizer may be smaller than the table
        assert len(load_prompt_file(path, tokenizer, vocab_size=size).prompts) == 4
    with pytest.raises(ValueError) as caught:
        load_prompt_file(path, tokenizer, vocab_size=ids["x"], prompt_max_len=20)
    assert str(caught.value).startswith(
        f"vocab_size={ids['x']} of pretrain is less than the token ids of {path} ask for: {ids['y']} 'y' in row 2 "
        f"(line 3) of {path}, {ids['z']} 'z' in row 1 (line 2) of {path} (the model has no embedding for them)"
    )


def test_rows_with_tokens_past_the_vocabulary_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    z = tokenizer.convert_tokens_to_ids("z")
    path = write_jsonl([{"input": "a", "output": "b"}, {"input": "a", "output": "yz"}])
    assert len(load_sft_file(path, tokenizer, vocab_size=z + 1).rows) == 2
    with pytest.raises(ValueError, match=rf"vocab_size={z} .* {z} 'z' in row 1 \(line 2\)"):
        load_sft_file(path, tokenizer, vocab_size=z)
    many = write_jsonl([{"input": "abcdefghijkl", "output": "b"}])
    with pytest.raises(ValueError, match=r"vocab_size=2 .*'e' in row 0 \(line 1\) of \S+ and 7 more \(the model"):
        load_sft_file(many, tokenizer, vocab_size=2)


def test_the_eos_of_supervised_rows_counts_and_unused_tokens_do_not(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Gemma 3's tokenizer has a token past the text model's table that no text has."""
    path = write_jsonl([{"input": "a", "output": "b"}])
    last = tokenizer.convert_tokens_to_ids("b")
    assert last + 1 < len(tokenizer)
    assert len(load_sft_file(path, tokenizer, vocab_size=last + 1).rows) == 1
    with pytest.raises(ValueError, match="1 '</s>' in row 0"):
        load_sft_file(path, tokenizer, vocab_size=1)
