"""A reward model cut in any way gives each response the score that Transformers' classifier gives it."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.reward import RewardGroup
from megarlhf.cluster.workers import MegatronWorker
from megarlhf.config.roles import ROLES
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, GroupTokens, Prompt, Rollout, Sample
from tests.distributed.layouts import LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_reward_model

EOS, OTHER_STOP = 2, 3
# Layout, and the data-parallel replica of each of its ranks.
CASES = {
    "one process": (Layout(max_tokens=24), [0]),
    "share-prefix": (Layout(share_prefix=True, max_tokens=48), [0]),
    "TP2-SP": (LAYOUTS["TP2-SP"], [0, 0]),
    "PP2": (LAYOUTS["PP2"], [0, 0]),
    "DP2": (LAYOUTS["DP2"], [0, 1]),
    "CP2": (LAYOUTS["CP2-p2p"], [0, 0]),
    "share-prefix-PP2-DP2": (Layout(pipeline=2, data=2, share_prefix=True, max_tokens=48), [0, 1, 0, 1]),
    "PP2-VPP2": (LAYOUTS["PP2-VPP2"], [0, 0]),
}


def rollout() -> Rollout:
    """Groups of responses that were cut, and stopped by EOS or by another token; group 1 has lost its first sample."""
    draw = np.random.default_rng(3)
    samples, tokens = [], []
    for group in range(4):
        prompt = draw.integers(4, 100, size=1 + 3 * group).astype(np.int32)
        responses = [draw.integers(4, 100, size=size).astype(np.int32) for size in draw.integers(1, 8, size=3)]
        for number, last in enumerate((None, EOS, OTHER_STOP)):
            if last is not None:
                responses[number][-1] = last
            if (group, number) != (1, 0):
                samples.append(
                    Sample(
                        prompt=Prompt(index=group, text="", token_ids=prompt, label=None),
                        **{"group_id": group, "sample_id": number, "response_length": len(responses[number])},
                        finish_reason="length" if last is None else "stop",
                        **{"response_text": "", "weight_version": 0},
                    )
                )
        lengths = np.array([len(response) for response in responses])
        tokens.append(
            GroupTokens(
                prompt_ids=prompt,
                response_ids=np.concatenate(responses),
                rollout_log_probs=np.zeros(int(lengths.sum()), dtype=np.float32),
                lengths=lengths,
            )
        )
    return Rollout(samples=samples, tokens=tuple(tokens))


def sequences(given: Rollout) -> list[list[int]]:
    """What each sample reads like: with EOS behind what another token has stopped."""
    found = []
    for sample in given.samples:
        group = given.tokens[sample.group_id]
        response = np.split(group.response_ids, np.cumsum(group.lengths)[:-1])[sample.sample_id].tolist()
        found.append([*group.prompt_ids.tolist(), *response, *([EOS] if response[-1] == OTHER_STOP else [])])
    return found


def transformers_scores(model_dir: Path, rows: Sequence[Sequence[int]]) -> list[float]:
    """Of Transformers' classifier, padded on the right; it reads the last token that is no padding."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}  # which alone caps attention scores
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, **options).eval()
    longest = max(map(len, rows))
    with torch.no_grad():
        return model(
            torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        ).logits.flatten().tolist()


def scores_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, given: Sequence[Any]
) -> Floats | None:
    """What one rank's worker answers."""
    with world(layout, rank, init_method):
        worker = object.__new__(MegatronWorker)  # whose __init__ takes over the process's output
        config = SimpleNamespace(cluster=SimpleNamespace(colocate_all_models=False))
        worker.spec = SimpleNamespace(role=ROLES["reward"], config=config)
        worker.engine = build(layout, model_dir, head="value", optimizer=False)
        return worker.scores(given[rank])


class PoolWorkers(WorkerGroup):
    """Processes of the pool: a call runs when all of its results are waited for."""

    def __init__(self, ranks: RankPool, layout: Layout, model_dir: Path) -> None:
        self._run = lambda given: ranks.run(layout.world_size, scores_case, layout, model_dir, given)

    def put(self, values: Sequence[Any]) -> list[Any]:
        return list(values)

    def submit_to(self, rank: int, method: str, *args: Any) -> Any:
        assert method == "scores"
        return args[0]

    def wait_for(self, refs: Sequence[Any], what: str, *, timeout_seconds: float | None = None) -> list[Any]:
        return self._run(list(refs))


def scored(ranks: RankPool, case: str, model_dir: Path, given: Rollout, *, eos: int | None = EOS) -> Floats:
    layout, replicas = CASES[case]
    packing = PackingOptions(max_tokens=layout.max_tokens, share_prefix=layout.share_prefix)
    packing = packing.for_pipeline(layout.pipeline, layout.virtual)
    group = RewardGroup(
        PoolWorkers(ranks, layout, model_dir), [(replica, packing) for replica in replicas], turn=nullcontext()
    )
    return group.scores(given, eos=eos)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("rewards") / "llama")


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(ranks: RankPool, llama: Path, case: str) -> None:
    given = rollout()
    expected = transformers_scores(llama, sequences(given))
    assert scored(ranks, case, llama, given).tolist() == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.1, "they are told apart"


@pytest.mark.parametrize(("family", "case"), [("qwen2", "TP2-SP"), ("gemma2", "share-prefix")])
def test_other_families(ranks: RankPool, tmp_path: Path, family: str, case: str) -> None:
    given, model_dir = rollout(), make_reward_model(tmp_path / family, family=family)
    expected = transformers_scores(model_dir, sequences(given))
    assert scored(ranks, case, model_dir, given).tolist() == pytest.approx(expected, abs=1e-5)


def test_fewer_responses_than_ranks_and_a_model_without_eos(ranks: RankPool, llama: Path) -> None:
    given = rollout()
    one = Rollout(samples=given.samples[2:3], tokens=given.tokens)
    assert one.samples[0].finish_reason == "stop"
    without = sequences(one)[0][:-1]
    (expected,) = transformers_scores(llama, [without])
    assert scored(ranks, "DP2", llama, one, eos=None).tolist() == pytest.approx([expected], abs=1e-5)
