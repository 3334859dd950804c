"""Sampling below the whole distribution: vLLM's log-probs against those of the trainer, in several layouts.

Importing vLLM and loading the engine takes about 10 seconds.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarlhf.data.packing import copy_runs
from megarlhf.data.types import KEPT_TOKENS, TargetValues, TrainingRows, starts_of, training_rows
from megarlhf.engine.schedule import kept_tokens
from megarlhf.parallel.truncation import Truncation
from megarlhf.rollout.engine import RolloutEngine
from tests.distributed.cases import by_row
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.rollout.models import Answer, answers, make_engine_model, make_prompts, transformers_log_probs

TRUNCATIONS = {
    "top_p": Truncation(top_p=0.9),
    "top_k": Truncation(top_k=20),
    "min_p": Truncation(min_p=0.05),
    "all": Truncation(top_p=0.8, top_k=30, min_p=0.02),
}
TEMPERATURE = 0.7
WHOLE = "one process"
Trained = Callable[[str], dict[str, list[list[Tensor]]]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampled(model_dir: Path) -> Iterator[dict[str, list[Answer]]]:
    environment = dict(os.environ)
    engine = RolloutEngine(model_dir, dtype="float32", seed=0, max_model_len=128, kv_cache_gib=0.1, threads=1)
    options = {"group_ids": [0, 1, 2], "n_samples": 5, "max_tokens": 12, "temperature": TEMPERATURE}
    options |= {"stop_token_ids": [2], "run_seed": 42, "step": 3}
    prompts, found = make_prompts([5, 40, 70]), {}
    for name, of in TRUNCATIONS.items():
        truncation = {"top_p": of.top_p, "top_k": -1 if of.top_k is None else of.top_k, "min_p": of.min_p}
        found[name] = answers(engine.generate(prompts, **options | truncation))
        likeliest = [answers(engine.generate(prompts, **options | t | {"greedy": True})) for t in ({}, truncation)]
        assert likeliest[0] == likeliest[1]
    yield found
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


def rows_of(samples: list[Answer]) -> TrainingRows:
    return training_rows([s.prompt_ids + s.response_ids for s in samples], [len(s.prompt_ids) for s in samples])


def trainer_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, rows: dict[str, TrainingRows]
) -> dict[str, list[dict[int, Tensor]]]:
    """Log-probs by row: of the weights that sampled; of these in the pass that keeps tokens; of other weights over the
    kept tokens; of other weights over those that they keep."""
    with world(layout, rank, init_method):
        found = {}
        for name, of in TRUNCATIONS.items():
            engine = build(layout, model_dir, optimizer=False, temperature=TEMPERATURE, truncation=of)
            batches = engine.micro_batches(rows[name])
            passes = [engine.forward(batches)]
            if of.top_k is not None:
                both = engine.forward(batches, compute=kept_tokens)
                first, with_kept = both, rows[name]
                if engine.ranks.is_last_stage:
                    first = TargetValues(starts=both.starts, lengths=both.lengths, values=both.values[:, 0].copy())
                    field = np.zeros((int(rows[name].num_targets.sum()), of.top_k), dtype=np.float32)
                    copy_runs(both.values[:, 1:], starts_of(both.lengths), both.lengths, field, both.starts)
                    with_kept = rows[name].with_fields({KEPT_TOKENS: field})
                with torch.no_grad():
                    for _, parameter in engine.named_parameters():
                        parameter.mul_(1.2)
                passes += [first, engine.forward(engine.micro_batches(with_kept)), engine.forward(batches)]
            if engine.ranks.is_last_stage:
                found[name] = [by_row(rows[name], values) for values in passes]
        return found


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def trained(ranks: RankPool, sampled: dict[str, list[Answer]], model_dir: Path) -> Trained:
    """Each pass's log-probs in a layout, row by row."""
    rows = {name: rows_of(samples) for name, samples in sampled.items()}

    @cache
    def passes(name: str) -> dict[str, list[list[Tensor]]]:
        layout = replace(LAYOUTS.get(name, SINGLE), max_tokens=200)
        by_rank = ranks.run(layout.world_size, trainer_case, layout, model_dir, rows)
        return {
            name: [[part[row] for row in range(len(rows[name]))] for part in parts]
            for name, parts in by_rank[-1].items()
        }

    return passes


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("CP2-p2p", "PP2")]


@pytest.mark.parametrize("layout", [WHOLE, "TP2-SP", *SLOW])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_trainer_and_vllm_agree(sampled: dict[str, list[Answer]], trained: Trained, name: str, layout: str) -> None:
    theirs = [torch.tensor(sample.rollout_log_probs) for sample in sampled[name]]
    own = trained(layout)[name]
    assert largest(own[0], theirs) < 1e-4
    if TRUNCATIONS[name].top_k is not None:
        assert largest(own[1], theirs) < 1e-4
        later = trained(WHOLE)[name]
        assert largest(own[2], later[2]) < 2e-5  # over the same tokens, whatever rank has them
        assert largest(own[3], later[3]) < 2e-5
        assert largest(own[2], own[3]) > 1e-2, "these weights would keep other tokens"


def test_the_whole_distribution_is_another(sampled: dict[str, list[Answer]], model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name, samples in sampled.items():
        whole = [transformers_log_probs(model, sample, TEMPERATURE) for sample in samples]
        assert largest(whole, [torch.tensor(sample.rollout_log_probs) for sample in samples]) > 0.05, name
