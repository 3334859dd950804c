"""Samples to score."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.reward.scorer import RewardScorer
from megarlhf.reward.sources import RewardSource, SumOfSources

MakeScorer = Callable[..., RewardScorer]  # of the text of a reward file and options, loaded (conftest.py)


def samples(*responses: str, label: Any = "7", stop_text: str = "") -> list[Sample]:
    """Samples with these responses and one label."""
    prompt = Prompt(index=0, text="Q: ", token_ids=np.array([1], dtype=np.int32), label=label)
    return [
        Sample(
            prompt=prompt,
            group_id=0,
            sample_id=index,
            response_length=1,
            response_text=response,
            stop_text=stop_text,
            finish_reason="stop",
            weight_version=0,
        )
        for index, response in enumerate(responses)
    ]


def scored_by(source: RewardSource, given: Sequence[Sample]) -> list[Sample]:
    """The samples as a run that has no other source scores them."""
    return SumOfSources([source]).score(Rollout(samples=list(given), tokens=()))
