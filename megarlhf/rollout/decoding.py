"""The text of a response, as rewards read it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def response_texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, stopped: bool, skip_special_tokens: bool
) -> tuple[str, str]:
    """Text of a response and, where special tokens are in it, the stop token at its end.

    Args:
        token_ids: of the response, the stop token included.
        stopped: whether the last token is a stop token.
        skip_special_tokens: leave special tokens out of the text.
    """
    ids = list(token_ids)
    text = str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    if skip_special_tokens or not stopped:
        return text, ""
    before = str(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return text, text[len(before) :] if text.startswith(before) else ""
