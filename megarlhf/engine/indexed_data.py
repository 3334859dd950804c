"""Megatron's indexed data sets (.bin and .idx) as units to train on: documents in a line, cut to one length.

A sequence is what GPTDataset of megatron-core makes: the documents of a split are shuffled and joined, and sequence i
is tokens [i * max_len, (i + 1) * max_len] of that line. So neighbours share one token, the last target of the one and
the first input of the other, and what is left at the end is dropped. Sequences are shuffled. Each is one segment: its
tokens attend across the borders of documents. The first epoch of a file is GPTDataset's of the same seed, in its order.

Otherwise than there, a sequence is found by a search in the running sum of the documents' lengths and not in a table of
the whole run: an epoch does not depend on train_iters, and a run may be continued for longer. Files are mapped; a step
reads the tokens of its own sequences.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Ints, TokenIds, TrainingRows
from megarlhf.formats.blends import parse_blend, parse_split, split_bounds

_MARK = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")  # mark, version, dtype, sequences, documents and one
_SCANNED_TOKENS = 2**28  # of each file, at set-up; the others are looked at as they are read
_CHUNK_TOKENS = 2**24
_FINGERPRINT_BYTES = 2**20  # of either end of a .bin

Part = Literal["train", "valid"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The sequences of a split of one indexed data set."""

    prefix: str  # path without .bin and .idx
    max_len: int
    documents: NDArray[np.int32]  # [d] numbers of the split's documents in the order of the line
    ends: Ints  # [d] place in the line after each of them
    order: NDArray[Any]  # [n] sequences in the order of the first epoch

    @cached_property
    def dataset(self) -> IndexedDataset:
        """The open files."""
        return IndexedDataset(self.prefix)

    def sequence(self, draw: int) -> TokenIds:
        """The max_len + 1 tokens of a sequence, counted from 0 over all epochs.

        Epoch e applies the shuffle e + 1 times, so that no epoch needs a table of its own.
        """
        epoch, place = divmod(draw, len(self.order))
        for _ in range(epoch + 1):
            place = int(self.order[place])
        start = place * self.max_len
        stop, parts = start + self.max_len + 1, []
        number = int(np.searchsorted(self.ends, start, side="right"))
        first = self.dataset.document_indices
        while start < stop:
            begin = int(self.ends[number - 1]) if number else 0
            taken = min(int(self.ends[number]), stop) - start
            if taken:  # a document may be empty
                at = int(first[self.documents[number]])
                parts.append(self.dataset.get(at, offset=start - begin, length=taken))
            start, number = start + taken, number + 1
        return np.concatenate(parts).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class IndexedUnits:
    """Sequences of several indexed data sets, drawn by their weights; a unit is one sequence.

    An epoch has as many units as its data sets have sequences. `build_exhaustive_blending_indices` of megatron-core
    spreads the draws of each, so that any stretch of units keeps the weights; a small data set with a large weight
    comes round several times in one epoch.
    """

    corpora: Sequence[Corpus]
    counts: Ints  # [c] units of an epoch from each
    sets: NDArray[np.int16]  # [units of an epoch] which data set
    draws: Ints  # [units of an epoch] and which of its sequences
    vocab_size: int
    limit: int | None = None  # units of an evaluation
    dropped: Mapping[str, int] = field(default_factory=dict)

    shuffles = False  # the units lie in the order of training

    def __len__(self) -> int:
        return self.num_units

    @property
    def num_units(self) -> int:
        """Units of an epoch."""
        return len(self.sets) if self.limit is None else min(self.limit, len(self.sets))

    def of_units(self, units: Sequence[int] | Ints) -> tuple[SupervisedData, Ints]:
        """The tokens of units, which count on over the epochs, and the indices of their rows.

        Raises:
            ValueError: a token that the model has no embedding for.
        """
        epochs, places = np.divmod(np.asarray(units, dtype=np.int64), len(self.sets))
        sets = self.sets[places]
        draws = self.draws[places] + epochs * self.counts[sets]
        length = self.corpora[0].max_len + 1
        ids = np.empty((len(sets), length), dtype=np.int32)
        for row, (number, draw) in enumerate(zip(sets.tolist(), draws.tolist(), strict=True)):
            ids[row] = self.corpora[number].sequence(draw)
            _check_tokens(ids[row], self.vocab_size, f"data_path={self.corpora[number].prefix}")
        rows = TrainingRows(
            input_ids=ids.reshape(-1),
            lengths=np.full(len(ids), length),
            prompt_lengths=np.ones(len(ids), dtype=np.int64),
            unit_ids=np.arange(len(ids)),
        )
        return SupervisedData(rows=rows), np.arange(len(ids))

    @cached_property
    def fingerprint(self) -> str:
        """Hex fingerprint of every .idx, of both ends of every .bin, and of how they are drawn."""
        whole = hashlib.blake2b(digest_size=16)
        for corpus in self.corpora:
            whole.update(json.dumps([corpus.max_len, len(corpus.order)]).encode() + self.counts.tobytes())
            whole.update(corpus.documents.tobytes())
            with open(corpus.prefix + ".idx", "rb") as file:
                while chunk := file.read(2**24):
                    whole.update(chunk)
            with open(corpus.prefix + ".bin", "rb") as file:
                whole.update(file.read(_FINGERPRINT_BYTES))
                file.seek(max(0, Path(corpus.prefix + ".bin").stat().st_size - _FINGERPRINT_BYTES))
                whole.update(file.read())
        return whole.hexdigest()

    def __str__(self) -> str:
        """What is drawn, in lines for the start log."""
        return "\n".join(
            f"{corpus.prefix}: {len(corpus.documents)} documents, {int(corpus.ends[-1])} tokens, {len(corpus.order)} "
            f"sequences of {corpus.max_len}; {count} of the {len(self.sets)} units of an epoch"
            for corpus, count in zip(self.corpora, self.counts.tolist(), strict=True)
        )

    def save(self, directory: Path) -> None:
        """Write all but the tokens into a directory, which is made, for `open`."""
        directory.mkdir()
        said = {"prefixes": [corpus.prefix for corpus in self.corpora], "max_len": self.corpora[0].max_len}
        said |= {"counts": self.counts.tolist(), "vocab_size": self.vocab_size, "limit": self.limit}
        (directory / "indexed.json").write_text(json.dumps(said))
        arrays: dict[str, NDArray[Any]] = {"sets": self.sets, "draws": self.draws}
        for number, corpus in enumerate(self.corpora):
            arrays |= {f"{name}{number}": getattr(corpus, name) for name in ("documents", "ends", "order")}
        for name, values in arrays.items():
            np.save(directory / f"{name}.npy", values)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """What `save` has written; the arrays are the files themselves, read-only, once for all processes."""
        said = json.loads((directory / "indexed.json").read_text())

        def array(name: str) -> NDArray[Any]:
            return np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray)

        corpora = [
            Corpus(
                prefix=prefix,
                max_len=said["max_len"],
                documents=array(f"documents{number}"),
                ends=array(f"ends{number}"),
                order=array(f"order{number}"),
            )
            for number, prefix in enumerate(said["prefixes"])
        ]
        given = {"vocab_size": said["vocab_size"], "limit": said["limit"], "counts": np.array(said["counts"])}
        return cls(corpora=corpora, sets=array("sets"), draws=array("draws"), **given)


def load_indexed(
    data_path: tuple[str, ...],
    *,
    split: str,
    part: Part,
    max_len: int,
    seed: int,
    vocab_size: int,
    limit: int | None = None,
) -> IndexedUnits:
    """Open the indexed data sets of a blend, check them, and lay out an epoch of one part of their documents.

    Args:
        data_path: as for `parse_blend`; without weights an epoch has each sequence once.
        split: as for `parse_split`. Parts are disjoint runs of documents.
        vocab_size: of the model's config.json.
        limit: most units of an epoch; None: all.
    Raises:
        ValueError: files that are not whole or not of each other, token ids that the model does not have, a part too
            short for one sequence, or a weight too small for one.
    """
    prefixes, weights = parse_blend(data_path)
    parts = parse_split(split)
    assert parts is not None, "checked with the options"
    corpora = [_corpus(prefix, parts, part, max_len=max_len, seed=seed, vocab_size=vocab_size) for prefix in prefixes]
    sizes = np.array([len(corpus.order) for corpus in corpora])
    counts = sizes if weights is None else _apportion(weights, int(sizes.sum()))
    for prefix, count in zip(prefixes, counts.tolist(), strict=True):
        if not count:
            raise ValueError(
                f"data_path={' '.join(data_path)}; the weight of {prefix} gives it none of the {sizes.sum()} sequences "
                "of an epoch: raise it, or leave the data set out"
            )
    sets, draws = np.zeros(counts.sum(), dtype=np.int16), np.zeros(counts.sum(), dtype=np.int64)
    helpers.build_exhaustive_blending_indices(sets, draws, counts, len(counts))
    return IndexedUnits(corpora=corpora, counts=counts, sets=sets, draws=draws, vocab_size=vocab_size, limit=limit)


def open_indexed(prefix: str) -> IndexedDataset:
    """An indexed data set whose two files are whole and of each other.

    Raises:
        ValueError: they are not.
    """
    named, again = f"data_path={prefix}", "copy both files again, or make them with tools/preprocess_data.py"
    with open(prefix + ".idx", "rb") as file:
        header = file.read(_HEADER.size)
        size = file.seek(0, os.SEEK_END)
    mark, version, code, num_sequences, num_documents = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if mark != _MARK or version != 1 or code not in [dtype.value for dtype in DType]:
        raise ValueError(f"{named}: {prefix}.idx is not the index of an indexed data set: {again}")
    told = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size not in (told, told + num_sequences):  # with a byte a sequence for several modes
        raise ValueError(f"{named}: {prefix}.idx has {size} bytes and its head tells of {told} (it is cut): {again}")
    dtype, found = np.dtype(DType.dtype_from_code(code)), Path(prefix + ".bin").stat().st_size
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{named}: {prefix}.idx says that the data is {dtype}; tokens are integers: make it again")
    if not found:
        raise ValueError(f"{named}: {prefix}.bin is empty: {again}")
    dataset = IndexedDataset(prefix)
    told = int(dataset.sequence_lengths.sum(dtype=np.int64)) * dtype.itemsize
    if told != found:
        raise ValueError(
            f"{named}: {prefix}.bin has {found} bytes and {prefix}.idx tells of {told} (one of them is cut, or of "
            f"another data set): {again}"
        )
    return dataset


class CorpusWriter:
    """Writes an indexed data set document by document; the files appear when it is closed.

    Args:
        vocab_size: of the tokenizer; Megatron stores ids below 65,500 in two bytes and others in four.
    """

    def __init__(self, prefix: str, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.num_documents, self.num_tokens = 0, 0
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin.partial", dtype=DType.optimal_dtype(vocab_size))

    def add_documents(self, ids: TokenIds, lengths: Ints) -> None:
        """Append documents: the tokens of all of them, and how many each has."""
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            self._builder.add_document(document, [len(document)])
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def close(self) -> None:
        """Write the index and give both files their names."""
        self._builder.finalize(f"{self.prefix}.idx.partial")
        for suffix in (".bin", ".idx"):
            Path(f"{self.prefix}{suffix}.partial").replace(self.prefix + suffix)

    def abandon(self) -> None:
        """Remove what has been written."""
        self._builder.data_file.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self.prefix}{suffix}.partial").unlink(missing_ok=True)


def _corpus(
    prefix: str, parts: tuple[float, float, float], part: Part, *, max_len: int, seed: int, vocab_size: int
) -> Corpus:
    dataset, whole = open_indexed(prefix), str(Path(prefix).resolve())
    bounds = np.append(0, np.cumsum(dataset.sequence_lengths, dtype=np.int64))[dataset.document_indices]
    _scan(dataset, bounds, vocab_size, prefix)
    at = split_bounds(parts, len(bounds) - 1)
    first, end = (at[0], at[1]) if part == "train" else (at[1], at[2])
    random = np.random.RandomState(seed)  # GPTDataset's: documents first, then sequences
    documents = np.arange(first, end, dtype=np.int32)
    random.shuffle(documents)
    ends = np.cumsum(np.diff(bounds)[documents])
    number = (int(ends[-1]) - 1) // max_len if len(ends) else 0
    if number < 1:
        raise ValueError(
            f"data_path={prefix}; {'training' if part == 'train' else 'validation'} has documents {first} to {end} "
            f"with {int(ends[-1]) if len(ends) else 0} tokens, and a sequence takes max_len + 1 = {max_len + 1}: use "
            "more data, a smaller max_len, or another split (1,0,0 is all for training)"
        )
    order = np.arange(number, dtype=np.min_scalar_type(number))
    random.shuffle(order)
    return Corpus(prefix=whole, max_len=max_len, documents=documents, ends=ends, order=order)


def _apportion(weights: Sequence[float], total: int) -> Ints:
    """`total` in whole numbers proportional to weights, the largest remainders rounded up."""
    shares = np.array(weights) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    rest = np.argsort(counts - shares, kind="stable")[: total - int(counts.sum())]
    counts[rest] += 1
    return counts


def _scan(dataset: IndexedDataset, bounds: Ints, vocab_size: int, prefix: str) -> None:
    """Look at the first tokens of a file."""
    end, dtype = min(int(bounds[-1]), _SCANNED_TOKENS), dataset.index.dtype
    for start in range(0, end, _CHUNK_TOKENS):
        count = min(_CHUNK_TOKENS, end - start)
        ids = dataset.bin_reader.read(dtype=dtype, count=count, offset=start * np.dtype(dtype).itemsize)
        _check_tokens(ids, vocab_size, f"data_path={prefix}", bounds=bounds - start)


def _check_tokens(ids: NDArray[Any], vocab_size: int, named: str, *, bounds: Ints | None = None) -> None:
    if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
        return
    place = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
    where = "" if bounds is None else f" in document {int(np.searchsorted(bounds, place, side='right')) - 1}"
    raise ValueError(
        f"{named}: token id {ids[place]}{where}, and vocab_size={vocab_size} of pretrain (the model has no embedding "
        "for it): make the data with the model's tokenizer, or resize the model's embedding"
    )
