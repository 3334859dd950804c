"""One vLLM engine with a tiny tied Llama: log-probs, seeds, stops and weight updates, against Transformers.

Importing vLLM and loading the engine takes about 10 seconds.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megarlhf.data.types import TokenIds
from megarlhf.rollout import reload, weight_sources
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.platform import engine_environment
from tests.rollout.models import (
    Answer,
    SharedModel,
    answers,
    make_engine_model,
    make_prompts,
    perturbed,
    transformers_log_probs,
)

PROMPTS = make_prompts([5, 40, 70])
BUDGET = 150  # tokens that vLLM computes at a time: fewer than the prompts of a call have
OPTIONS: dict[str, Any] = {
    "group_ids": [0, 1, 2],
    "n_samples": 4,
    "max_tokens": 12,
    "temperature": 1.0,
    "stop_token_ids": [2],
    "run_seed": 42,
    "step": 3,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[RolloutEngine]:
    environment = dict(os.environ)
    engine = RolloutEngine(
        model_dir,
        dtype="float32",
        seed=0,
        max_model_len=128,
        max_num_seqs=16,
        kv_cache_gib=0.1,
        threads=1,
        passed={"max_num_batched_tokens": BUDGET},
    )
    yield engine
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


def generate(engine: RolloutEngine, prompts: Sequence[TokenIds] = PROMPTS, **changes: Any) -> list[Answer]:
    """All samples, prompt by prompt, with some of OPTIONS changed."""
    return answers(engine.generate(prompts, **OPTIONS | changes))


def worst_difference(model: torch.nn.Module, samples: list[Answer], temperature: float = 1.0) -> float:
    """Largest |log-prob of the engine - log-prob of Transformers| over all tokens."""
    return max(
        float((transformers_log_probs(model, s, temperature) - torch.tensor(s.rollout_log_probs)).abs().max())
        for s in samples
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_distribution(
    engine: RolloutEngine, model_dir: Path, temperature: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    samples = generate(engine, temperature=temperature)
    assert worst_difference(model, samples, temperature) < 1e-4
    assert worst_difference(model, samples, 1.7 - temperature) > 1e-2  # at the other temperature


def test_samples_are_ordered_and_complete(engine: RolloutEngine) -> None:
    groups = engine.generate(PROMPTS, **OPTIONS | {"group_ids": [7, 8, 9]})
    assert [len(group.lengths) for group in groups] == [4, 4, 4]
    samples = answers(groups)
    assert [s.prompt_ids for s in samples] == [tuple(p.tolist()) for p in PROMPTS for _ in range(4)]
    assert {s.weight_version for s in samples} == {0}
    for sample in samples:
        assert len(sample.response_ids) == len(sample.rollout_log_probs) <= 12
    for place, group_id in enumerate((7, 8, 9)):  # each sample's seed is its own group's and number's
        for number in range(4):
            seeds = OPTIONS | {"group_ids": [group_id], "n_samples": number + 1}
            alone = answers(engine.generate(PROMPTS[place : place + 1], **seeds))
            assert alone[number].response_ids == samples[4 * place + number].response_ids


def test_seeds_decide_the_tokens(engine: RolloutEngine) -> None:
    def tokens(**changes: Any) -> list[tuple[int, ...]]:
        return [s.response_ids for s in generate(engine, **changes)]

    first = tokens()
    assert tokens() == first
    assert len(set(first[:4])) == 4
    assert not set(first) & set(tokens(step=4))
    assert not set(first) & set(tokens(run_seed=43))
    alone = generate(engine, PROMPTS[1:2], group_ids=[1])
    assert [s.response_ids for s in alone] == first[4:8]
    twice = generate(engine, [PROMPTS[1]] * 2, group_ids=[1, 5])
    assert len({s.response_ids for s in twice}) == 8  # a prompt that a batch holds twice is answered twice


def test_a_call_begins_with_an_empty_prefix_cache(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its samples are those of any engine, whatever it has answered before."""
    cached, inner = [], engine._llm.generate

    def recorded(*arguments: Any, **options: Any) -> Any:
        outputs = inner(*arguments, **options)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", recorded)
    prompts = make_prompts([70] * 20)  # more than the engine begins at once: the last find the first ones' blocks
    shared = [np.concatenate([prompts[0][:64], prompt[64:]]) for prompt in prompts]
    for _ in range(2):
        generate(engine, shared, group_ids=list(range(20)), n_samples=1)
    assert cached[0][0] == cached[1][0] == 0 and max(cached[0]) == 64
    assert cached[0] == cached[1]


def test_prompts_beyond_a_batch_of_tokens_wait_whole(engine: RolloutEngine) -> None:
    """vLLM would cut one of them, and then seeds fail on a CPU."""
    prompts = make_prompts([70, 71, 72, 73, 74])
    together = generate(engine, prompts, group_ids=[0, 1, 2, 3, 4], n_samples=1)
    alone = [generate(engine, [prompt], group_ids=[i], n_samples=1)[0] for i, prompt in enumerate(prompts)]
    assert [each.response_ids for each in together] == [each.response_ids for each in alone]


def test_stop_token_ends_a_response_and_is_kept(
    engine: RolloutEngine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(engine, stop_token_ids=[])
    assert {s.finish_reason for s in whole} == {"length"}
    assert {len(s.response_ids) for s in whole} == {12}
    stop = whole[0].response_ids[5]
    cut = generate(engine, stop_token_ids=[stop])
    for sample, full in zip(cut, whole, strict=True):
        end = full.response_ids.index(stop) + 1 if stop in full.response_ids else 12
        assert sample.response_ids == full.response_ids[:end]
        assert sample.finish_reason == ("stop" if stop in full.response_ids else "length")
    assert cut[0].finish_reason == "stop"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert worst_difference(model, cut) < 1e-4  # the stop token's included
    for sample in whole + cut:
        assert sample.text == " ".join(f"t{i}" for i in sample.response_ids if i not in (0, 2))
        assert sample.stop_text == "", "it is told where special tokens are in the text alone"
    monkeypatch.setattr(engine, "_texts", partial(engine._texts, skip_special_tokens=False))
    for sample in generate(engine, stop_token_ids=[stop]):
        assert sample.text == " ".join(f"t{i}" for i in sample.response_ids)
        space = " " if len(sample.response_ids) > 1 else ""
        assert sample.stop_text == (f"{space}t{stop}" if sample.finish_reason == "stop" else "")


def test_greedy_takes_the_likeliest_token(engine: RolloutEngine, model_dir: Path) -> None:
    (sample,) = generate(engine, PROMPTS[:1], group_ids=[0], n_samples=1, greedy=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = list(sample.prompt_ids)
    for token in sample.response_ids:
        assert int(model(torch.tensor([tokens])).logits[0, -1].argmax()) == token
        tokens.append(token)
    assert worst_difference(model, [sample]) < 1e-4


def test_top_k_log_probs_are_renormalised(engine: RolloutEngine) -> None:
    samples = generate(engine, top_k=1)
    assert all(log_prob == 0 for s in samples for log_prob in s.rollout_log_probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 59}, "max_tokens=59 with a prompt of 70 tokens .* max_model_len=128"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"group_ids": [0]}, "shorter"),
    ],
)
def test_generate_refuses(engine: RolloutEngine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(engine, **changes)


def test_longer_than_the_model_is_refused_before_vllm_starts(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len=257 .* max_position_embeddings=256"):
        RolloutEngine(model_dir, dtype="float32", seed=0, max_model_len=257)


def test_environment_shares_threads_over_ranks() -> None:
    assert engine_environment(threads=8, tensor_parallel_size=2)["OMP_NUM_THREADS"] == "4"
    with pytest.raises(ValueError, match="threads=1 .* tensor_parallel_size=2"):
        engine_environment(threads=1, tensor_parallel_size=2)


@pytest.fixture(params=["direct", "cut", "loader"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How weights come in: packed from views, from parts in several blocks, or by vLLM's loader."""
    if request.param == "loader":
        monkeypatch.setattr(weight_sources, "plan_direct_update", lambda model, tensors: None)
    return str(request.param)


def update(engine: RolloutEngine, shared: SharedModel, version: int) -> dict[str, Any]:
    return engine.update_weights(version, shared.checksum())


def test_update_brings_new_weights(engine: RolloutEngine, model_dir: Path, way: str) -> None:
    model = perturbed(model_dir, seed=1)
    shared = SharedModel(model, cut=way == "cut")
    engine.connect_weights(shared.blocks)
    reported = update(engine, shared, 5)
    assert (reported["version"], reported["checksum"]) == (5, shared.checksum()) and reported["seconds"] > 0
    assert reported["applied"] == ("loader" if way == "loader" else "direct")
    samples = generate(engine)
    assert worst_difference(model, samples) < 1e-4
    assert {s.weight_version for s in samples} == {5}

    # Changed in place, as the trainer does at every later step: nothing in the engine looks into its memory.
    model = perturbed(model_dir, seed=2)
    shared.write(model)
    assert worst_difference(model, generate(engine)) > 1e-2
    update(engine, shared, 6)
    assert worst_difference(model, generate(engine)) < 1e-4


def test_without_repacking_the_tied_head_stays_stale(
    engine: RolloutEngine, model_dir: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap that `repack_output_heads` is for: everything is new but the head."""
    model = perturbed(model_dir, seed=30 + ["direct", "cut", "loader"].index(way))
    shared = SharedModel(model, cut=way == "cut")
    engine.connect_weights(shared.blocks)
    with monkeypatch.context() as patch:
        patch.setattr(reload, "repack_output_heads", lambda model: None)
        update(engine, shared, 7)
    assert worst_difference(model, generate(engine)) > 1e-2
    update(engine, shared, 8)
    assert worst_difference(model, generate(engine)) < 1e-4


def test_wrong_checksum_changes_nothing(engine: RolloutEngine, model_dir: Path, way: str) -> None:
    model = perturbed(model_dir, seed=4)
    shared = SharedModel(model, cut=way == "cut")
    engine.connect_weights(shared.blocks)
    update(engine, shared, 9)
    other = perturbed(model_dir, seed=5)
    shared.write(other)
    sent = shared.checksum()
    with torch.no_grad():
        other.model.norm.weight[0] += 1  # one number is enough
    shared.write(other)
    with pytest.raises(ValueError, match=f"checksum={sent} of weight version 10 does not match"):
        engine.update_weights(10, sent)
    samples = generate(engine)
    assert {s.weight_version for s in samples} == {9}
    assert worst_difference(model, samples) < 1e-4


def test_a_missing_weight_is_refused_and_whole_weights_repair(engine: RolloutEngine, model_dir: Path) -> None:
    model = perturbed(model_dir, seed=6)
    norm, model.model.norm = model.model.norm, None
    partial = SharedModel(model)
    model.model.norm = norm
    engine.connect_weights(partial.blocks)
    with pytest.raises(RuntimeError, match=r"lacks weights of the model: model\.norm\.weight"):
        update(engine, partial, 11)
    with pytest.raises(RuntimeError, match="failed halfway"):
        generate(engine)
    whole = SharedModel(model)
    engine.connect_weights(whole.blocks)
    update(engine, whole, 12)
    assert worst_difference(model, generate(engine)) < 1e-4


def test_an_engine_that_knows_no_memory_says_so(engine: RolloutEngine) -> None:
    version = engine.weight_version
    engine._llm.collective_rpc("shutdown_weight_transfer_engine")
    with pytest.raises(RuntimeError, match="before init_weight_transfer_engine has said where they are"):
        engine.update_weights(version + 1, "0" * 32)
    assert engine.weight_version == version


def test_an_engine_wakes_part_by_part_for_an_update(engine: RolloutEngine, model_dir: Path, way: str) -> None:
    """The same calls as on a GPU, where each of them frees or takes memory."""
    model = perturbed(model_dir, seed=7)
    shared = SharedModel(model, cut=way == "cut")
    engine.connect_weights(shared.blocks)
    engine.sleep(keep_weights=False)
    assert engine._llm.collective_rpc("weight_status")[0]["version"] == engine.weight_version == -1
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        generate(engine)
    engine.wake(["weights"])
    update(engine, shared, 13)
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        generate(engine)
    engine.wake(["kv_cache"])
    samples = generate(engine)
    assert {s.weight_version for s in samples} == {13}
    assert worst_difference(model, samples) < 1e-4


def test_an_engine_keeps_its_weights_in_a_sleep_or_refuses_to_answer(engine: RolloutEngine, model_dir: Path) -> None:
    shared = SharedModel(perturbed(model_dir, seed=8))
    engine.connect_weights(shared.blocks)
    update(engine, shared, 14)
    before = [s.response_ids for s in generate(engine)]
    engine.sleep(keep_weights=True)
    engine.wake(["weights", "kv_cache"])
    samples = generate(engine)
    assert [s.response_ids for s in samples] == before and {s.weight_version for s in samples} == {14}
    engine.sleep(keep_weights=False)
    engine.wake(["weights", "kv_cache"])
    with pytest.raises(RuntimeError, match="the weights are dropped"):
        generate(engine)
    update(engine, shared, 15)
    assert [s.response_ids for s in generate(engine)] == before
