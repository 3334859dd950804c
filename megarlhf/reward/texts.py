"""Scoring of texts that come from elsewhere, as the server does (server.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from megarlhf.data.types import Prompt, Rollout, Sample, TokenIds
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
