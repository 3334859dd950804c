"""What is trained on of samples that have been scored: the best of each prompt, its best and worst, or all of them.

Samples are chosen by the place of their prompt, and so two equal prompts of a batch are two groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarlhf.data.types import Ints

Row = Mapping[str, Any]
Rewards = NDArray[np.float64]
REWARD_TEMPLATE = "{input} <rm_score>: {reward} "  # of conditional SFT, also with which a prompt asks for a reward
POST_PROCESSORS = ("rs", "iter_dpo", "csft")  # OpenRLHF's names: rejection sampling, iterative DPO, conditional SFT


@dataclass(frozen=True, kw_only=True, eq=False)
class Extremes:
    """The best and the worst sample of each group that has a result; the first of equals."""

    best: Ints  # [g] indices of samples, in the order of the groups' numbers
    worst: Ints  # [g]
    num_empty: int  # groups without any usable result


def extremes(groups: Ints, rewards: Rewards) -> Extremes:
    """The sample of the largest and of the smallest reward in each group.

    Args:
        groups: [n] number of each sample's group, in any order.
        rewards: [n]; NaN where there is no result, which is never chosen.
    """
    with_result = np.flatnonzero(~np.isnan(rewards))
    order = with_result[np.lexsort((with_result, -rewards[with_result], groups[with_result]))]
    first = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))
    best = order[first]
    order = with_result[np.lexsort((with_result, rewards[with_result], groups[with_result]))]
    return Extremes(best=best, worst=order[first], num_empty=len(np.unique(groups)) - len(first))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows to train on, and what was left out."""

    rows: list[dict[str, Any]]
    num_ties: int = 0  # groups whose samples all have one reward, which tell no better from worse
    num_empty: int = 0  # groups without any usable result; of conditional SFT samples without one

    def __str__(self) -> str:
        return f"{len(self.rows)} rows selected; ties left out: {self.num_ties}, without a result: {self.num_empty}"


def rejection_sampling(samples: Sequence[Row], groups: Ints, rewards: Rewards) -> Selection:
    """input and output of each group's best sample, for SFT."""
    found = extremes(groups, rewards)
    return Selection(
        rows=[_of(samples[i], "input", "output", "label") | {"reward": rewards[i].item()} for i in found.best],
        num_empty=found.num_empty,
    )


def iterative_dpo(samples: Sequence[Row], groups: Ints, rewards: Rewards) -> Selection:
    """prompt, chosen and rejected of each group, for DPO: its best and its worst sample.

    A group whose rewards are all equal is left out. So is one whose best and worst are the same text, which rewards
    that are no function of the text may give.
    """
    found = extremes(groups, rewards)
    texts = np.array([sample["output"] for sample in samples], dtype=object)
    differs = (texts[found.best] != texts[found.worst]).astype(bool)  # of equal rewards both are the first sample
    rows = [
        {
            "prompt": samples[chosen]["input"],
            "chosen": samples[chosen]["output"],
            "rejected": samples[rejected]["output"],
            "chosen_reward": rewards[chosen].item(),
            "rejected_reward": rewards[rejected].item(),
        }
        for chosen, rejected in zip(found.best[differs], found.worst[differs], strict=True)
    ]
    return Selection(rows=rows, num_ties=int((~differs).sum()), num_empty=found.num_empty)


def conditional_sft(
    samples: Sequence[Row], groups: Ints, rewards: Rewards, *, template: str = REWARD_TEMPLATE
) -> Selection:
    """All samples, each with its reward in its prompt, for SFT.

    Args:
        template: with {input} and {reward} for the prompt and its reward, which is written with two digits.
    """
    chosen = np.flatnonzero(~np.isnan(rewards))
    rows = [
        _of(samples[i], "output")
        | {"input": with_reward(str(samples[i]["input"]), f"{rewards[i]:.2f}", template), "reward": rewards[i].item()}
        for i in chosen
    ]
    return Selection(rows=rows, num_empty=len(samples) - len(rows))


def with_reward(prompt: str, reward: str, template: str = REWARD_TEMPLATE) -> str:
    """A prompt that names a reward; what stands in braces in prompt or reward is text."""
    before, _, rest = template.partition("{input}")
    return before.replace("{reward}", reward) + prompt + rest.replace("{reward}", reward)


SELECTIONS: dict[str, Callable[..., Selection]] = {
    "rs": rejection_sampling,
    "iter_dpo": iterative_dpo,
    "csft": conditional_sft,
}


def group_numbers(samples: Sequence[Row]) -> Ints:
    """[n] number of each sample's prompt: its `place`, or in files that have none one for each different `input`.

    Raises:
        ValueError: some samples have a place and others have none.
    """
    placed = [sample.get("place") is not None for sample in samples]
    if all(placed):
        return np.array([sample["place"] for sample in samples], dtype=np.int64)
    if any(placed):
        raise ValueError(f"{sum(placed)} of {len(placed)} samples have a place and the others none: select them apart")
    numbers = {text: number for number, text in enumerate(dict.fromkeys(sample["input"] for sample in samples))}
    return np.array([numbers[sample["input"]] for sample in samples], dtype=np.int64)


def rewards_of(samples: Sequence[Row], *, trainable: bool = False, normalize: bool = False) -> Rewards:
    """[n] rewards; NaN where a sample has none.

    Args:
        trainable: NaN also where the output is empty, which nobody is trained on.
        normalize: shift and scale them to mean 0 and std 1 over all samples with a result; equal ones become 0.
    """
    given = [None if trainable and not sample["output"] else sample.get("reward") for sample in samples]
    rewards = np.array([np.nan if reward is None else reward for reward in given], dtype=np.float64)
    if normalize and not np.isnan(rewards).all():
        deviation = float(np.nanstd(rewards))
        rewards = (rewards - np.nanmean(rewards)) / (deviation if deviation > 0 else 1.0)
    return rewards


def _of(sample: Row, *keys: str) -> dict[str, Any]:
    return {key: sample[key] for key in keys if key in sample}
