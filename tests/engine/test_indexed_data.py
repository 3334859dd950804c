"""Indexed data sets against megatron-core's own reader, builder, GPTDataset and splits."""

import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megarlhf.data.sampling import PromptSampler
from megarlhf.engine.indexed_data import CorpusWriter, IndexedUnits, load_indexed
from megarlhf.formats.blends import blend_errors, parse_blend, parse_split, split_bounds

from megatron.core.datasets.blended_megatron_dataset_config import (  # isort: skip  (after megarlhf.engine)
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # isort: skip
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # isort: skip
from megatron.core.datasets.utils import Split  # isort: skip

LENGTHS = [3, 1, 17, 8, 40, 5, 5, 9, 12, 30, 2, 7]


def documents(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents whose tokens all differ."""
    starts = np.cumsum([first, *lengths])
    return [np.arange(a, b, dtype=np.int32) for a, b in pairwise(starts.tolist())]


def write(prefix: Path, docs: list[np.ndarray], *, vocab_size: int = 1000) -> str:
    writer = CorpusWriter(str(prefix), vocab_size=vocab_size)
    writer.add_documents(np.concatenate(docs), np.array([len(doc) for doc in docs]))
    writer.close()
    return str(prefix)


def load(*data_path: str, **changes: Any) -> IndexedUnits:
    options = {"split": "1,0,0", "part": "train", "max_len": 8, "seed": 5, "vocab_size": 1000}
    return load_indexed(data_path, **(options | changes))


def drawn(units: IndexedUnits, *places: int) -> np.ndarray:
    data, rows = units.of_units(places)
    assert rows.tolist() == list(range(len(places))) and data.rows.num_targets.tolist() == [8] * len(places)
    return data.rows.input_ids.reshape(len(places), -1)


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(1000, 8, "<u2"), (128256, 4, "<i4")])
def test_files_are_what_the_format_says(tmp_path: Path, vocab_size: int, code: int, dtype: str) -> None:
    docs = documents([2, 3, 1])
    prefix = write(tmp_path / "a", docs, vocab_size=vocab_size)
    pointers = np.array([0, 2, 5]) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    index += struct.pack("<3i", 2, 3, 1) + struct.pack("<3q", *pointers) + struct.pack("<4q", 0, 1, 2, 3)
    assert Path(prefix + ".idx").read_bytes() == index
    assert Path(prefix + ".bin").read_bytes() == np.concatenate(docs).astype(dtype).tobytes()
    read = IndexedDataset(prefix)
    assert [read[i].tolist() for i in range(3)] == [doc.tolist() for doc in docs]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def gpt_dataset(prefix: str, split: Split, first: int, end: int, max_len: int, seed: int, cache: Path) -> GPTDataset:
    tokenizer = SimpleNamespace(vocab_size=1000, eod=0, pad=-1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=max_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return GPTDataset(IndexedDataset(prefix), prefix, np.arange(first, end, dtype=np.int32), None, split, config)


@pytest.mark.parametrize("max_len", [2, 8, 19])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_the_first_epoch_is_gpt_datasets(tmp_path: Path, part: Any, max_len: int) -> None:
    """Of a file of megatron-core's own builder: every sequence, in order; later epochs have the same, otherwise."""
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for doc in documents(LENGTHS):
        builder.add_document(doc, [len(doc)])
    builder.finalize(str(tmp_path / "a.idx"))
    prefix, split = str(tmp_path / "a"), "60,30,10"
    units = load(prefix, part=part, split=split, max_len=max_len)
    bounds = split_bounds((60, 30, 10), len(LENGTHS))
    at, name = (0, Split.train) if part == "train" else (1, Split.valid)
    theirs = gpt_dataset(prefix, name, bounds[at], bounds[at + 1], max_len, 5, tmp_path / "cache")
    assert len(theirs) == units.num_units
    expected = [[*theirs[i]["tokens"].tolist(), int(theirs[i]["labels"][-1])] for i in range(len(theirs))]
    data, _ = units.of_units(range(2 * units.num_units))
    found = data.rows.input_ids.reshape(-1, max_len + 1).tolist()
    assert found[: len(expected)] == expected
    assert sorted(found[len(expected) :]) == sorted(expected)
    assert len(expected) < 5 or found[len(expected) :] != expected


@pytest.mark.parametrize("text", ["949,50,1", "969, 30, 1", "1,0,0", "2,1", "5", "0.5,0.25,0.25"])
@pytest.mark.parametrize("number", [1, 12, 1001])
def test_splits_are_megatrons(text: str, number: int) -> None:
    parts = parse_split(text)
    assert parts is not None
    bounds = split_bounds(parts, number)
    assert bounds == sorted(bounds) and bounds[-1] == number
    for place, ends in enumerate(convert_split_vector_to_split_matrix(parse_and_normalize_split(text))):
        if ends is not None:
            assert [round(end * float(number)) for end in ends] == bounds[place : place + 2]


@pytest.mark.parametrize("text", ["", "0,1,0", "a,b", "1,2,3,4", "1,-1,0", "inf", "1,,1"])
def test_a_split_that_is_none(text: str) -> None:
    assert parse_split(text) is None


def test_parts_share_no_document(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents([20] * 40))
    seen = []
    for part in ("train", "valid"):
        units = load(prefix, part=part, split="3,1,0")
        seen.append(set(drawn(units, *range(units.num_units)).reshape(-1).tolist()))
    assert not seen[0] & seen[1] and max(seen[0]) < 600 <= min(seen[1])


@pytest.mark.parametrize("data_path", [("a", "b"), ("0.7", "a", "0.2", "b", "0.1", "c")])
def test_any_stretch_of_a_blend_keeps_the_weights(
    tmp_path: Path, data_path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, number, first in (("a", 40, 0), ("b", 400, 1000), ("c", 150, 9000)):
        write(Path(name), documents([8] * number, first), vocab_size=20000)
    units = load(*data_path, vocab_size=20000)
    sizes = {"a": 39, "b": 399, "c": 149}
    prefixes, weights = parse_blend(data_path)
    shares = np.array([sizes[name] for name in prefixes] if weights is None else weights, dtype=float)
    shares /= shares.sum()
    assert units.num_units == sum(sizes[name] for name in prefixes)
    for first, number in ((0, 100), (37, 211), (0, 3 * units.num_units)):  # the last comes round "a" 31 times
        firsts = drawn(units, *range(first, first + number))[:, 0]
        found = np.bincount(np.searchsorted([1000, 9000], firsts, side="right"), minlength=len(shares))
        assert np.abs(found - shares * number).max() <= max(3.0, 0.01 * number)
    if weights is None:
        rows = drawn(units, *range(units.num_units))
        assert set(Counter(map(bytes, rows)).values()) == {1}


def test_what_is_saved_opens_as_the_same(tmp_path: Path) -> None:
    paths = ("2", write(tmp_path / "a", documents(LENGTHS)), "1", write(tmp_path / "b", documents([30, 20], 500)))
    units = load(*paths, limit=7)
    units.save(tmp_path / "saved")
    opened = IndexedUnits.open(tmp_path / "saved")
    assert opened.num_units == units.num_units == 7 and opened.fingerprint == units.fingerprint
    places = [0, 3, 50, 2]
    assert drawn(opened, *places).tolist() == drawn(units, *places).tolist()
    assert isinstance(opened.draws.base, np.memmap), "mapped once for all ranks"
    for changed in (load(*paths, max_len=9), load(*paths, seed=6), load("1", paths[1], "1", paths[3])):
        assert changed.fingerprint != units.fingerprint
    write(tmp_path / "a", documents(LENGTHS)[:-1] + [np.full(7, 3, dtype=np.int32)])
    assert load(*paths).fingerprint != units.fingerprint


def test_the_sampler_counts_on() -> None:
    sampler = PromptSampler(5, 3, 1, first_step=2, consumed=4, shuffles=False)
    assert [sampler.batch(step) for step in (2, 3)] == [[4, 5, 6], [7, 8, 9]]


def cut(prefix: str, suffix: str, number: int) -> None:
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:number])


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda p: cut(p, ".bin", -2), {}, r"a\.bin has 276 bytes and \S+a\.idx tells of 278"),
        (lambda p: Path(p + ".bin").write_bytes(Path(p + ".bin").read_bytes() + b"12"), {}, "has 280 bytes"),
        (lambda p: cut(p, ".bin", 0), {}, r"a\.bin is empty"),
        (lambda p: cut(p, ".idx", -8), {}, r"a\.idx has 274 bytes and its head tells of 282"),
        (lambda p: cut(p, ".idx", 12), {}, "is not the index"),
        (lambda p: Path(p + ".idx").write_bytes(b"something else that is long enough"), {}, "is not the index"),
        (lambda p: None, {"vocab_size": 60}, r"token id 60 in document 4, and vocab_size=60 of pretrain"),
        (lambda p: None, {"max_len": 200}, r"documents 0 to 12 with 139 tokens, and a sequence takes .* = 201"),
        (lambda p: None, {"split": "99,1,0", "part": "valid"}, "validation has documents 12 to 12 with 0 tokens"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, damage: Any, changes: dict[str, Any], message: str) -> None:
    prefix = write(tmp_path / "a", documents(LENGTHS))
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        load(prefix, **changes)


def test_other_numbers_are_no_tokens(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.float32)
    builder.add_document(torch.ones(20), [20])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(ValueError, match="says that the data is float32"):
        load(str(tmp_path / "a"))


def test_tokens_past_the_scanned_ones_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarlhf.engine.indexed_data._SCANNED_TOKENS", 50)
    monkeypatch.setattr("megarlhf.engine.indexed_data._CHUNK_TOKENS", 20)
    prefix = write(tmp_path / "a", documents(LENGTHS))
    units = load(prefix, vocab_size=60)
    with pytest.raises(ValueError, match=r"token id \d+, and vocab_size=60"):
        drawn(units, *range(units.num_units))
    with pytest.raises(ValueError, match="token id 45 in document 4"):
        load(prefix, vocab_size=45)


def test_a_weight_too_small_for_a_sequence(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / name, documents(LENGTHS)) for name in "ab"]
    with pytest.raises(ValueError, match=r"weight of \S+b gives it none of the 34 sequences"):
        load("1", prefixes[0], "0.001", prefixes[1])


def test_blends_are_megatrons(tmp_path: Path) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for texts in (["a"], ["a", "b"], ["1", "a", "2.5", "b"], ["a", "b", "c"]):
        assert parse_blend(tuple(texts)) == get_blend_from_list(texts)
    write(tmp_path / "a", documents([3]))
    assert blend_errors((str(tmp_path / "a"),)) == []
    assert [error.split(":")[0][-6:] for error in blend_errors(("b",))] == [" b.idx", " b.bin"]
    (error,) = blend_errors(("0", str(tmp_path / "a")))
    assert "weights are above 0" in error
