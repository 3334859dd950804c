"""Requests that wait for a scorer which fails."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from fastapi import HTTPException

from megarlhf.reward.server import Batcher, Limits
from megarlhf.reward.sources import SourceResult
from megarlhf.reward.texts import Text, TextScorer

LIMITS = Limits(
    token=None, max_body_bytes=100, max_queries=9, max_len=9, max_batch_tokens=9, max_waiting_queries=9
)


class Broken:
    """A scorer whose process has ended."""

    def score(self, texts: Sequence[Text]) -> SourceResult:
        raise RuntimeError("rank 1 died")


class Connected:
    """A client that waits."""

    async def is_disconnected(self) -> bool:
        return False


def test_who_comes_after_the_scorer_has_failed_is_told_too() -> None:
    async def ask(batcher: Batcher) -> Any:
        text = Text(query="a", prompt=None, label=None, is_cut=False, num_tokens=1)
        with pytest.raises(HTTPException) as refused:
            await asyncio.wait_for(batcher.submit(cast(Any, Connected()), [text]), 5)
        return refused.value.status_code, refused.value.detail

    async def run() -> None:
        batcher = Batcher(cast(TextScorer, Broken()), LIMITS)
        scoring = asyncio.create_task(batcher.run())
        first = await ask(batcher)
        with pytest.raises(RuntimeError, match="rank 1 died"):
            await scoring
        assert [first, await ask(batcher)] == [(500, "scoring failed: rank 1 died")] * 2

    asyncio.run(run())
