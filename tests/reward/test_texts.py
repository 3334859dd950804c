"""Texts as a reward model reads them: where they end, and what they share."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from examples.demo.make_assets import make_tokenizer
from megarlhf.data.types import Rollout
from megarlhf.reward.sources import SourceResult
from megarlhf.reward.texts import ModelTextScorer, Text

EOS = 2


class Reads:
    """A source that gives back what it reads, and each row's length as its reward."""

    def __init__(self) -> None:
        self.rollout = Rollout(samples=[], tokens=())

    def score(self, rollout: Rollout) -> SourceResult:
        self.rollout = rollout
        return SourceResult(outcomes=[(float(len(row)), None) for row in rows(rollout)])


def rows(rollout: Rollout) -> list[list[int]]:
    """Tokens of each sample."""
    found = []
    for sample in rollout.samples:
        group = rollout.tokens[sample.group_id]
        parts = np.split(group.response_ids, np.cumsum(group.lengths)[:-1])
        assert sample.response_length == len(parts[sample.sample_id]) >= 1 and len(group.prompt_ids) >= 1
        found.append([*group.prompt_ids.tolist(), *parts[sample.sample_id].tolist()])
    return found


def scorer(source: Any) -> ModelTextScorer:
    return ModelTextScorer(source, make_tokenizer(), nullcontext())


def texts(*queries: str, prompts: Sequence[str | None] | None = None, cut: bool = False) -> list[Text]:
    given = prompts or [None] * len(queries)
    return [Text(query=q, prompt=p, label=None, is_cut=cut) for q, p in zip(queries, given, strict=True)]


@pytest.mark.parametrize("tail", ["", "</s>", "<pad>", "</s><pad><pad>", "<pad></s>", "</s></s>"])
def test_a_whole_text_ends_with_eos_once(tail: str) -> None:
    found = scorer(Reads()).tokenize(texts(f"1+2=3{tail}"))[0]
    assert found.token_ids is not None and found.num_tokens == len(found.token_ids) == 6
    assert found.token_ids.tolist() == make_tokenizer()("1+2=3")["input_ids"] + [EOS]


@pytest.mark.parametrize("tail", ["", "</s>", "<pad>"])
def test_a_text_that_was_cut_ends_as_it_came(tail: str) -> None:
    found = scorer(Reads()).tokenize(texts(f"1+2{tail}", cut=True))[0]
    assert found.token_ids is not None and found.token_ids.tolist() == make_tokenizer()(f"1+2{tail}")["input_ids"]


def test_texts_without_a_response_are_told() -> None:
    with pytest.raises(ValueError, match=r"query\[1\] has 1 tokens"):
        scorer(Reads()).tokenize(texts("1", "</s>"))
    with pytest.raises(ValueError, match=r"query\[0\] has 0 tokens"):
        scorer(Reads()).tokenize(texts("", cut=True))


def test_texts_of_one_prompt_share_what_they_begin_with() -> None:
    source, given = Reads(), ("1+2=3", "1+2=", "1+29", "7+7", "8", "1+2=5")
    made = scorer(source)
    read = made.tokenize(texts(*given, prompts=["1+2", "1+2", "1+2", "7", "7", "1+2"]))
    outcomes = made.score(read).outcomes
    assert rows(source.rollout) == [text.token_ids.tolist() for text in read if text.token_ids is not None]
    assert outcomes == [(float(len(query) + 1), None) for query in given]
    # "7+7" and "8" begin with other tokens: each has a group of its own then.
    assert [len(group.prompt_ids) for group in source.rollout.tokens] == [3, 3, 1, 5]
