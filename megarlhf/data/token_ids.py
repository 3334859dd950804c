"""What is asked of all token ids of a data file at once: their fingerprint, and whether the model knows them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.rows import Rows
from megarlhf.data.types import Ints, TokenIds

_SHOWN_TOKENS = 5


def fingerprint(ids: TokenIds, ends: Ints, labels: Sequence[Any]) -> str:
    """Hex fingerprint of token sequences and a JSON value for each, in their order; equal on every machine.

    Args:
        ids: of all sequences, behind one another.
        ends: place after the last one of each sequence.
    """
    total = hashlib.blake2b(len(ends).to_bytes(8, "little"), digest_size=16)
    total.update(ends.astype("<i8").tobytes())
    total.update(ids.astype("<i4").tobytes())
    total.update(json.dumps(labels, sort_keys=True, allow_nan=False).encode())
    return total.hexdigest()


def check_vocabulary(
    ids: TokenIds,
    ends: Ints,
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Rows,
    vocab_size: int,
) -> None:
    """Compare the token ids that occur with the model's embedding.

    Megatron pads the embedding: ids in the padding would train there, and those past it end in the index errors or,
    under tensor parallelism, in other tokens' embeddings. A tokenizer may hold more tokens than occur, or fewer than
    the model.

    Args:
        ids, ends: of rows, as for `fingerprint`.
        indices: place of each among `rows`.
        vocab_size: of the model's config.json.
    Raises:
        ValueError: ids from vocab_size on, named with their text and one row in which they occur.
    """
    outside = np.flatnonzero(ids >= vocab_size)
    if not len(outside):
        return
    tokens, first = np.unique(ids[outside], return_index=True)
    places = np.searchsorted(ends, outside[first], side="right")
    shown = [
        f"{token} {token_text(tokenizer, token)} in {rows.place(indices[place])}"
        for token, place in zip(tokens[:_SHOWN_TOKENS].tolist(), places[:_SHOWN_TOKENS].tolist(), strict=True)
    ]
    more = f" and {len(tokens) - len(shown)} more" if len(tokens) > len(shown) else ""
    raise ValueError(
        f"vocab_size={vocab_size} of pretrain is less than the token ids of {rows.path} ask for: "
        f"{', '.join(shown)}{more} (the model has no embedding for them): set tokenizer to the one that the model was "
        "trained with, or resize the model's embedding"
    )


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as the tokenizer spells it, in quotes; None where it has no such token."""
    return repr(tokenizer.convert_ids_to_tokens(token) if 0 <= token < 2**31 else None)
