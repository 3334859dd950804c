"""The text of responses, with and without special tokens, from a tokenizer of bytes."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megarlhf.rollout.engine import response_texts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<ans>", "</ans>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("text", "stopped", "skip", "expected"),
    [
        (" <ans>7 .</ans></s>", True, True, (" 7 .", "")),
        (" <ans>7 .</ans></s>", True, False, (" <ans>7 .</ans></s>", "</s>")),
        ("<ans>7", False, False, ("<ans>7", "")),
        ("é!", True, False, ("é!", "!")),  # a stop token need not be special
        ("</s>", True, False, ("</s>", "</s>")),
        ("</s>", True, True, ("", "")),
    ],
)
def test_special_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, stopped: bool, skip: bool, expected: tuple[str, str]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert response_texts(tokenizer, ids, stopped=stopped, skip_special_tokens=skip) == expected
