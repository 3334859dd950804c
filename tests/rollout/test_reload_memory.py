"""What vLLM's layerwise reload holds while weights of a model with experts come from two expert-parallel ranks.

Real ranks hold a tiny Mixtral, half of each layer's experts each; a real engine loads it from their memory.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.model_executor.model_loader.reload import layerwise

from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats.shared_memory import SharedBlock, SharedTensors, checksum
from megarlhf.rollout.engine import RolloutEngine
from tests.distributed.layouts import MOE_LAYOUTS, build, world
from tests.distributed.pool import RankPool
from tests.rollout.models import make_engine_model, perturbed

pytestmark = pytest.mark.slow
LAYERS = 4
KEPT: list[torch.Tensor] = []  # a rank's shared memory, after its world has ended

Shared = tuple[list[SharedBlock], list[bytes]]


def share(rank: int, world_size: int, init_method: str, model_dir: Path) -> Shared:
    """The blocks and digests of one rank."""
    with world(MOE_LAYOUTS["EP2"], rank, init_method):
        shared = SharedWeights(build(MOE_LAYOUTS["EP2"], model_dir, optimizer=False))
        KEPT.extend(shared._shared)
        return shared.blocks, shared.refresh()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_model(tmp_path_factory.mktemp("model"), family="mixtral", tied=False, num_layers=LAYERS)


@pytest.fixture(scope="module")
def trained_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with other weights, which the ranks hold."""
    directory = tmp_path_factory.mktemp("trained")
    perturbed(model_dir, seed=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[RolloutEngine]:
    environment = dict(os.environ)
    engine = RolloutEngine(
        model_dir, dtype="float32", seed=0, max_model_len=64, max_num_seqs=4, kv_cache_gib=0.1, threads=1
    )
    yield engine
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def shared(ranks: RankPool, trained_dir: Path) -> tuple[list[SharedBlock], str]:
    """What both ranks hold, and the checksum."""
    parts = ranks.run(2, share, trained_dir)
    blocks = [block for blocks, _ in parts for block in blocks]
    return blocks, checksum(digest for _, digests in parts for digest in digests)


def held_bytes() -> int:
    """Bytes of all tensors that wait for the rest of their layer."""
    waiting = [arguments for info in layerwise.LAYERWISE_INFO.values() for _, arguments in info.loaded_weights]
    values = [value for arguments in waiting for name, value in arguments.arguments.items() if name != "param"]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def most_held(engine: RolloutEngine, blocks: list[SharedBlock], sent: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest `held_bytes` of an update, looked at whenever vLLM has taken another tensor."""
    most, original = 0, layerwise.get_numel_loaded

    def counted(*arguments: Any) -> Any:
        nonlocal most
        most = max(most, held_bytes())
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "get_numel_loaded", counted)
        engine.connect_weights(blocks)
        assert engine.update_weights(1, sent)["applied"] == "loader"
    assert held_bytes() == 0
    return most


def worst_difference(engine: RolloutEngine, trained_dir: Path) -> float:
    """Largest |log-prob of the engine - log-prob of Transformers| of a response."""
    model = AutoModelForCausalLM.from_pretrained(trained_dir, dtype=torch.float32)
    prompt = np.array([5, 9, 17], dtype=np.int32)
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "stop_token_ids": [], "run_seed": 1, "step": 0}
    (group,) = engine.generate([prompt], group_ids=[0], n_samples=1, **options)
    assert group.tokens is not None
    response = torch.from_numpy(group.tokens.response_ids).long()
    with torch.no_grad():
        logits = model(torch.cat([torch.from_numpy(prompt).long(), response])[None]).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
    return float((torch.from_numpy(group.tokens.rollout_log_probs) - expected).abs().max())


def test_a_reload_holds_one_layers_experts_at_most(
    engine: RolloutEngine, trained_dir: Path, shared: tuple[list[SharedBlock], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, sent = shared
    tensors = load_file(trained_dir / "model.safetensors")
    experts = sum(t.nbytes for name, t in tensors.items() if name.startswith("model.layers.0.block_sparse_moe.experts"))
    assert experts == 4 * 3 * 64 * 96 * 4  # experts, matrices of each, rows, columns, bytes of a number
    assert worst_difference(engine, trained_dir) > 1e-2
    assert most_held(engine, blocks, sent, monkeypatch) == experts
    assert worst_difference(engine, trained_dir) < 1e-4
    rank_by_rank = [replace(block, position=0) for block in blocks]
    half_of_all_and_of_the_first = (LAYERS / 2 + 1 / 2) * experts
    assert most_held(engine, rank_by_rank, sent, monkeypatch) == half_of_all_and_of_the_first


def test_tensors_come_in_the_tables_order(shared: tuple[list[SharedBlock], str], model_dir: Path) -> None:
    names = SharedTensors(shared[0]).names
    assert set(names) == set(load_file(model_dir / "model.safetensors"))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(LAYERS))
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    parts = [
        tuple(name.split(".")[5:7]) for name in names if name.startswith("model.layers.1.block_sparse_moe.experts")
    ]
    assert parts == [(str(expert), matrix) for expert in range(4) for matrix in ("w1", "w3", "w2")]
