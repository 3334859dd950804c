"""Weights that real ranks broadcast to a real engine are, bit for bit, those that it reads in their shared memory.

An engine for each model, so slow.
"""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM

from megarlhf.engine.sending import SentWeights
from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats.buckets import Bucket, plan_buckets
from megarlhf.formats.shared_memory import Block, SharedBlock, checksum
from megarlhf.parallel.groups import all_gather_objects
from megarlhf.parallel.weight_group import LostMemberError, Place, open_meeting
from megarlhf.rollout.engine import RolloutEngine
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.rollout.models import Answer, answers, make_engine_model, make_prompts, perturbed, transformers_log_probs

pytestmark = pytest.mark.slow
BUCKET = 40_000  # bytes: less than the embedding, more than any row
PROMPTS = make_prompts([5, 40])
KEPT: list[Any] = []  # a rank's memory, after its world has ended

CASES = {  # family, tied, layout of the trainer, tensor-parallel ranks of the engine; "by handle": see HandleGroup
    "dense": ("llama", False, LAYOUTS["PP2"], 1),
    "tied": ("qwen2", True, LAYOUTS["TP2-SP"], 1),
    "tied, DP2": ("gemma3", True, LAYOUTS["DP2-distopt"], 1),
    "experts at EP2": ("mixtral", False, MOE_LAYOUTS["EP2"], 1),
    "an engine of two ranks": ("llama", True, SINGLE, 2),
    "experts at EP2, by handle": ("mixtral", False, MOE_LAYOUTS["EP2"], 1),
    "an engine of two ranks, DP2, by handle": ("llama", False, LAYOUTS["DP2-distopt"], 2),
}


def share(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path
) -> tuple[list[SharedBlock], list[bytes]]:
    """One rank's part in shared memory."""
    with world(layout, rank, init_method):
        shared = SharedWeights(build(layout, model_dir, optimizer=False))
        KEPT.append(shared._shared)
        return shared.blocks, shared.refresh()


def offer(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> list[Block]:
    """What one rank would send."""
    with world(layout, rank, init_method):
        return SentWeights(build(layout, model_dir, optimizer=False)).blocks


def send(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, place: Place, fault: str
) -> list[str | None]:
    """Version 2, which has other numbers, then version 1; or a fault in the first of them."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, optimizer=False)
        sent = SentWeights(engine)
        by_handle = fault == "by handle"
        held = {r: blocks for r, blocks in enumerate(all_gather_objects(sent.blocks)) if blocks or by_handle}
        if rank in held:
            own, num_senders = replace(place, rank=list(held).index(rank)), len(held) if by_handle else None
            sent.join(plan_buckets(list(held.values()), most_bytes=BUCKET), own, num_senders=num_senders)
        if fault == "dies":
            fill, calls = sent._fill, list[int]()

            def dying(bucket: Bucket, memory: torch.Tensor) -> None:
                calls.append(1)
                if len(calls) == 5:
                    os._exit(7)
                fill(bucket, memory)

            sent._fill = dying  # type: ignore[method-assign]
        own = [(parameter, parameter.detach().clone()) for _, parameter in engine.named_parameters()]
        with torch.no_grad():
            for parameter, numbers in own:
                parameter.copy_(numbers + 1)
            tell_handle(sent, place, rank, 2, by_handle)
            first = sent.send(2)
            for parameter, numbers in own:
                parameter.copy_(numbers)
        tell_handle(sent, place, rank, 1, by_handle)
        second = sent.send(1)
        sent.leave()
        return [first, second]


def tell_handle(sent: SentWeights, place: Place, rank: int, version: int, by_handle: bool) -> None:
    """Where the test, which opened the meeting, finds it."""
    if by_handle:
        store = TCPStore(place.meeting.host, place.meeting.port, is_master=False)
        store.set(f"{version} {rank}", pickle.dumps(sent.open_buckets()))


def start(model_dir: Path, tensor_parallel_size: int) -> RolloutEngine:
    return RolloutEngine(
        model_dir,
        dtype="float32",
        seed=0,
        max_model_len=128,
        max_num_seqs=4,
        kv_cache_gib=0.1,
        threads=tensor_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
    )


def generate(engine: RolloutEngine) -> list[Answer]:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "stop_token_ids": [2], "run_seed": 1, "step": 0}
    return answers(engine.generate(PROMPTS, group_ids=[0, 1], n_samples=2, **options))


def state(engine: RolloutEngine) -> tuple[Any, Any]:
    """vLLM's own digests of its parameters, and what it computes with them and with the kernels that it packs."""
    samples = [(sample.response_ids, sample.rollout_log_probs) for sample in generate(engine)]
    return engine._llm.collective_rpc("compute_weight_checksums"), samples


@pytest.mark.parametrize("name", CASES)
def test_broadcast_is_shared_memory(ranks: RankPool, tmp_path: Path, name: str) -> None:
    family, tied, layout, engine_ranks = CASES[name]
    model_dir = make_engine_model(tmp_path / "model", family=family, tied=tied)
    model = perturbed(model_dir, seed=1)
    model.save_pretrained(tmp_path / "trained")
    parts = ranks.run(layout.world_size, share, layout, tmp_path / "trained")
    by_handle = "by handle" in name
    offered = ranks.run(layout.world_size, offer, layout, tmp_path / "trained")
    assert sum(map(bool, offered)) == (1 if "DP2" in name else layout.world_size), "of replicas one sends"
    held = [blocks for blocks in offered if blocks or by_handle]
    buckets = plan_buckets(held, most_bytes=BUCKET)
    engine = start(model_dir, engine_ranks)
    try:
        loaded = state(engine)
        engine.connect_weights([block for blocks, _ in parts for block in blocks])
        engine.update_weights(1, checksum(digest for _, digests in parts for digest in digests))
        expected = state(engine)
        assert expected != loaded
        store, meeting = open_meeting(one_host=True)
        size = len(held) + engine_ranks
        place = Place(meeting=meeting, rank=len(held), size=size, timeout_seconds=120)
        with ThreadPoolExecutor() as threads:
            sending = threads.submit(ranks.run, layout.world_size, send, layout, tmp_path / "trained", place, name[-9:])
            engine.join_weights(buckets, place, by_handle=by_handle)

            def handles(version: int) -> list[Any]:
                count = len(held) if by_handle else 0
                return [pickle.loads(store.get(f"{version} {rank}")) for rank in range(count)]

            # First other numbers, so that those of before do not count.
            reported = engine.update_weights(2, handles=handles(2))
            assert state(engine) != expected
            last = engine.update_weights(1, handles=handles(1))
            assert state(engine) == expected
            sums = sending.result()
        assert {first for first, _ in sums} - {None} == {reported["checksum"]}
        assert {second for _, second in sums} - {None} == {last["checksum"]} != {reported["checksum"]}
        assert (reported["version"], last["version"], last["applied"]) == (2, 1, "loader")
    finally:
        engine.close()


@pytest.mark.parametrize("engine_ranks", [1, 2])
def test_a_sender_that_dies_leaves_no_engine_that_generates(
    ranks: RankPool, tmp_path: Path, engine_ranks: int
) -> None:
    model_dir = make_engine_model(tmp_path / "model", tied=False)
    model = perturbed(model_dir, seed=1)
    model.save_pretrained(tmp_path / "trained")
    layout = LAYOUTS["PP2"]
    held = ranks.run(2, offer, layout, tmp_path / "trained")
    buckets = plan_buckets(held, most_bytes=BUCKET)
    engine = start(model_dir, engine_ranks)
    try:
        for fault in ("dies", ""):
            store, meeting = open_meeting(one_host=True)
            place = Place(meeting=meeting, rank=2, size=2 + engine_ranks, timeout_seconds=120)
            with ThreadPoolExecutor() as threads:
                sending = threads.submit(ranks.run, 2, send, layout, tmp_path / "trained", place, fault)
                engine.join_weights(buckets, place)
                if fault:
                    with pytest.raises(LostMemberError, match="weights do not get through"):
                        engine.update_weights(2)
                    with pytest.raises(RuntimeError, match="died with exit code 7|weights do not get through"):
                        sending.result()
                    assert engine.weight_version == -1
                    with pytest.raises(RuntimeError, match="failed halfway"):
                        generate(engine)
                else:
                    engine.update_weights(2)
                    engine.update_weights(1)
                    sending.result()
            del store
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
        for sample in generate(engine):  # a whole update mends what a partial one has left
            found = torch.tensor(sample.rollout_log_probs)
            torch.testing.assert_close(found, transformers_log_probs(reference, sample, 1.0), atol=1e-4, rtol=0)
    finally:
        engine.close()
