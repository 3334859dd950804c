"""Documents of a .jsonl file as tokens, in parallel and in their order; the file is never whole in memory."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from typing import Literal

import numpy as np

from megarlhf.data.rows import check_text
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.data.types import Ints, TokenIds
from megarlhf.formats.json_files import json_lines, json_row

TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]

_CHUNK_LINES = 256
_SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class CorpusTokenizer:
    """Text to tokens, as megatron-core's tokenizer of the same name makes them.

    Attributes:
        encode: tokens of a text, without BOS and EOS unless they were asked for.
        vocab_size: tokens that it has.
        eod: token that ends a document, the tokenizer's EOS; None where it has none.
    """

    encode: Callable[[str], Sequence[int]]
    vocab_size: int
    eod: int | None


@cache
def corpus_tokenizer(kind: TokenizerType, model: str, *, special_tokens: bool = False) -> CorpusTokenizer:
    """A tokenizer by Megatron's name for it; loaded once in a process.

    Args:
        model: directory of a Hugging Face tokenizer, or a sentencepiece .model file.
        special_tokens: let a Hugging Face tokenizer put its BOS and EOS around each text.
    Raises:
        ValueError: it cannot be loaded.
    """
    if kind == "HuggingFaceTokenizer":
        tokenizer = load_tokenizer(model, chat_template=None)

        def encode(text: str) -> Sequence[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids
            return ids

        return CorpusTokenizer(encode=encode, vocab_size=len(tokenizer), eod=tokenizer.eos_token_id)
    import sentencepiece  # only for those who ask for it

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(model)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer_model={model} is not a sentencepiece .model file: {error}") from error
    eod = processor.eos_id()
    return CorpusTokenizer(
        encode=processor.encode_as_ids, vocab_size=processor.get_piece_size(), eod=eod if eod >= 0 else None
    )


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Some documents of a file as tokens."""

    ids: dict[str, TokenIds]  # key -> tokens of all documents
    lengths: dict[str, Ints]  # key -> tokens of each
    num_bytes: int  # of the file
    errors: list[str]  # what is wrong with its lines; documents are then not whole


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Makes tokens of lines, in this process or another.

    Attributes:
        path: of the file, for messages.
        load: gives the tokenizer.
        keys: of each line's object; the text of each is a document of its own.
        eod: token to put behind each document.
    """

    path: str
    keys: tuple[str, ...]
    load: Callable[[], CorpusTokenizer]
    eod: int | None

    def encode(self, lines: Sequence[tuple[int, bytes]]) -> Documents:
        """Documents of lines with their numbers."""
        tokenizer = self.load()
        found: dict[str, list[TokenIds]] = {key: [] for key in self.keys}
        errors = []
        for number, line in lines:
            try:
                value = json_row(line)
                for key in self.keys:
                    ids = np.array(tokenizer.encode(_text(value, key)), dtype=np.int32)
                    if not len(ids):
                        raise ValueError(f"json_keys: {key!r} is empty: remove the row")
                    found[key].append(ids if self.eod is None else np.append(ids, np.int32(self.eod)))
            except ValueError as error:
                errors.append(f"line {number} of {self.path}: {error}")
        none = np.empty(0, dtype=np.int32)
        return Documents(
            ids={key: np.concatenate([none, *parts]) for key, parts in found.items()},
            lengths={key: np.array([len(part) for part in parts], dtype=np.int64) for key, parts in found.items()},
            num_bytes=sum(len(line) for _, line in lines),
            errors=errors,
        )


def encode_file(encoder: Encoder, *, workers: int) -> Iterator[Documents]:
    """The documents of a .jsonl file in their order, some at a time.

    Raises:
        ValueError: lines that cannot be used; the first few of them, as soon as these are found.
    """
    errors: list[str] = []
    for documents in _encoded(encoder, workers):
        errors += documents.errors
        if len(errors) >= _SHOWN_ERRORS:
            break
        if not errors:
            yield documents
    if errors:
        raise ValueError("\n".join(errors[:_SHOWN_ERRORS]))


def _encoded(encoder: Encoder, workers: int) -> Iterator[Documents]:
    if workers == 1:
        yield from map(encoder.encode, _chunks(encoder.path))
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    pending: deque[Future[Documents]] = deque()
    try:
        for lines in _chunks(encoder.path):
            pending.append(pool.submit(encoder.encode, lines))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(path: str) -> Iterator[list[tuple[int, bytes]]]:
    lines = json_lines(path)
    while chunk := list(islice(lines, _CHUNK_LINES)):
        yield chunk


def _text(value: dict[str, object], key: str) -> str:
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none, for the row is empty"
        raise ValueError(f"json_keys: {key!r} is not there; the keys are {keys}: set json_keys")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"json_keys: {key!r} holds a {type(text).__name__}, not a string")
    check_text(text)
    return text
