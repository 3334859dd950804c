"""Scoring of texts that come from elsewhere, as the server does (server.py)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.rows import Rows
from megarlhf.data.templates import encode_prompts, make_renderer
from megarlhf.data.types import GroupTokens, Prompt, Rollout, Sample, TokenIds
from megarlhf.reward.model import RewardModel
from megarlhf.reward.sources import RewardSource, SourceResult

CHARACTERS_PER_TOKEN = 4  # where there is no tokenizer that could count


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A prompt and the response behind it."""

    query: str  # both
    prompt: str | None  # None: nobody has said where it ends
    label: Any  # reference answer, any JSON value
    is_cut: bool  # the response has reached its limit and has no end
    num_tokens: int = 0
    token_ids: TokenIds | None = None  # [num_tokens] for scorers that read tokens


class TextScorer(Protocol):
    """What scores texts, one call after the other."""

    def open(self) -> None:
        """Start what it needs.

        Raises:
            ValueError: it cannot score, and why.
        """

    def tokenize(self, texts: Sequence[Text]) -> list[Text]:
        """The texts with their tokens, or the number of these; from any thread.

        Raises:
            ValueError: one cannot be read.
        """

    def score(self, texts: Sequence[Text]) -> SourceResult:
        """A reward or the reason why there is none for each."""

    def close(self) -> None:
        """End what it has started."""


class CodeTextScorer:
    """Scores texts by a rule or a reward function."""

    def __init__(self, source: RewardSource, *, stop_texts: Sequence[str] = ()) -> None:
        """Nothing runs before `open`.

        Args:
            stop_texts: what may end a query and is no part of the answer for a rule.
        """
        self._source, self._stop_texts = source, stop_texts

    def open(self) -> None:
        """Load the code. Raises ValueError."""
        self._source.check()

    def tokenize(self, texts: Sequence[Text]) -> list[Text]:
        """See TextScorer; a token is counted for each CHARACTERS_PER_TOKEN."""
        found = []
        for index, text in enumerate(texts):
            if text.prompt is not None and text.prompt not in text.query:
                raise ValueError(f"prompts[{index}] is not in query[{index}] (a query is a prompt and its response)")
            found.append(replace(text, num_tokens=-(-len(text.query) // CHARACTERS_PER_TOKEN)))
        return found

    def score(self, texts: Sequence[Text]) -> SourceResult:
        """See TextScorer. What stands before a prompt, such as BOS, counts as part of it."""
        samples = []
        groups = groupby(texts, key=lambda text: (text.prompt, repr(text.label)))
        for group_id, (_, members) in enumerate(groups):
            for sample_id, text in enumerate(members):
                end = 0 if text.prompt is None else text.query.index(text.prompt) + len(text.prompt)
                prompt = Prompt(index=0, text=text.query[:end], token_ids=_NO_TOKENS, label=text.label)
                samples.append(
                    Sample(
                        prompt=prompt,
                        group_id=group_id,
                        sample_id=sample_id,
                        response_length=0,
                        response_text=text.query[end:],
                        stop_text=next((stop for stop in self._stop_texts if text.query.endswith(stop)), ""),
                        finish_reason="length" if text.is_cut else "stop",
                        weight_version=0,
                    )
                )
        return self._source.score(Rollout(samples=samples, tokens=()))

    def close(self) -> None:
        """End its processes."""
        self._source.close()


_NO_TOKENS: TokenIds = np.zeros(0, dtype=np.int32)


class ModelTextScorer:
    """Scores texts by a reward model.

    A text that is whole ends with EOS, once, whether or not it came with it and with padding behind, as OpenRLHF 0.5's
    server has it; one that was cut ends as it came. Texts of one prompt that follow each other share what they begin
    with.
    """

    def __init__(
        self, source: RewardModel, tokenizer: PreTrainedTokenizerBase, started: AbstractContextManager[None]
    ) -> None:
        """Nothing runs before `open`.

        Args:
            tokenizer: the model's own.
            started: in whose block the source's model runs.
        """
        self._source, self._tokenizer, self._started = source, tokenizer, started
        self._renderer = make_renderer(tokenizer, apply_chat_template=False, input_template=None)
        self._stack = ExitStack()

    def open(self) -> None:
        """Start the model. Raises ValueError, or what its processes fail with."""
        self._source.check()
        self._stack.enter_context(self._started)

    def tokenize(self, texts: Sequence[Text]) -> list[Text]:
        """See TextScorer."""
        eos, found = self._tokenizer.eos_token_id, []
        queries = [text.query if text.is_cut else self._without_end(text.query) for text in texts]
        rows = Rows(path="the request", rows=[{}] * len(texts))
        encoded = encode_prompts(self._renderer, queries, rows=rows)
        for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if not text.is_cut and eos is not None:
                ids = np.append(ids, np.int32(eos))
            if len(ids) < 2:
                raise ValueError(f"query[{index}] has {len(ids)} tokens (a prompt and a response have two or more)")
            found.append(replace(text, num_tokens=len(ids), token_ids=ids))
        return found

    def score(self, texts: Sequence[Text]) -> SourceResult:
        """See TextScorer."""
        samples, tokens = list[Sample](), list[GroupTokens]()
        pairs = [(text.prompt, text.token_ids) for text in texts if text.token_ids is not None]
        for _, members in groupby(pairs, key=lambda pair: (pair[0], pair[1][0])):
            rows = [ids for _, ids in members]
            shared = _common_length(rows)
            prompt = Prompt(index=0, text="", token_ids=rows[0][:shared], label=None)
            lengths = np.array([len(row) - shared for row in rows], dtype=np.int64)
            for sample_id, length in enumerate(lengths.tolist()):
                samples.append(
                    Sample(
                        prompt=prompt,
                        group_id=len(tokens),
                        sample_id=sample_id,
                        response_length=length,
                        response_text="",
                        finish_reason="length",  # EOS is among the tokens
                        weight_version=0,
                    )
                )
            tokens.append(
                GroupTokens(
                    prompt_ids=prompt.token_ids,
                    response_ids=np.concatenate([row[shared:] for row in rows]),
                    rollout_log_probs=np.zeros(int(lengths.sum()), dtype=np.float32),
                    lengths=lengths,
                )
            )
        return self._source.score(Rollout(samples=samples, tokens=tuple(tokens)))

    def close(self) -> None:
        """End the model's processes."""
        self._stack.close()

    def _without_end(self, query: str) -> str:
        """A query without EOS and padding at its end."""
        ends = [end for end in (self._tokenizer.eos_token, self._tokenizer.pad_token) if end]
        while any(query.endswith(end) for end in ends):
            query = query.removesuffix(next(end for end in ends if query.endswith(end)))
        return query


def _common_length(rows: Sequence[TokenIds]) -> int:
    """Tokens with which all rows begin, without the last of the shortest: at least the first, which is the same."""
    shortest = min(map(len, rows)) - 1
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
