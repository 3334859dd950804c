"""Seeds and texts of the sampled responses."""

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def request_seed(run_seed: int, step: int, place: int, sample_id: int) -> int:
    """Seed of one response, 63 bits: the same in every process, engine and batch, whatever else is generated beside it.

    Args:
        run_seed: seed of the run.
        step: training step, so that a prompt which comes again is answered anew.
        place: of the prompt in the step's batch, not in the data: a prompt that a batch holds twice is answered twice.
        sample_id: number of the response among those of its prompt.
    """
    key = f"{run_seed}/{step}/{place}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


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
