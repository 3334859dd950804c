"""A student and its teacher in real layouts, against Transformers: loss, metrics and gradients."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarlhf.data.supervised import SupervisedData
from megarlhf.engine.engine import MegatronEngine
from megarlhf.parallel.distillation import Direction
from megarlhf.trainers.kd import HIDDEN, TOP_K, kd_task, top_k_task, with_top_tokens
from megarlhf.trainers.parity import whole_gradients
from megarlhf.trainers.parity_cases import fitting
from tests.distributed.cases import Parts, assemble, make_rows, parts, sequences
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import VOCAB_SIZE, make_model

KD_COEF, K = 0.3, 70  # more tokens than a shard of the student has
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
CASES = {"single": SINGLE} | {name: LAYOUTS[name] for name in ("TP2-SP", "PP2-VPP2", "CP2-p2p", "DP2")}
Found = tuple[float, dict[str, float], Parts]


def distil(student: MegatronEngine, teacher: MegatronEngine, direction: Direction) -> Found:
    """Loss, metrics and gradients; and what there is of the teacher meanwhile."""
    assert teacher.optimizer is None
    task = kd_task(student, teacher, kd_coef=KD_COEF, direction=direction)
    data = SupervisedData(rows=fitting(student, make_rows()))
    for _ in range(2):  # it wakes as it fell asleep
        batches = task.prepare(data, np.arange(len(data.rows)), student.micro_batches(data.rows))
        assert teacher.memory.num_bytes()["parameters"] == 0
    assert {name for batch in batches for name in batch.fields if name == HIDDEN} == (
        {HIDDEN} if student.ranks.is_last_stage else set()
    )
    denominator = task.denominator(data, np.arange(len(data.rows)))
    with whole_gradients(student):
        loss, metrics, _ = student.accumulate_gradients(batches, task.objective, denominator=denominator)
    total, sums = student.evaluate(batches, task.objective)
    assert total / denominator == pytest.approx(loss, abs=1e-5)
    assert {name: value / count for name, (value, count) in sums.items()} == pytest.approx(metrics, abs=1e-5)
    return loss, metrics, parts(student, gradients=True)


def distil_top(student: MegatronEngine, teacher_dir: Path, layout: Layout, direction: Direction, place: Path) -> Found:
    """The same from likeliest tokens, which a teacher computes once."""

    def build_teacher() -> MegatronEngine:
        assert not list(place.glob("*.npy")), "it is not loaded where its file is"
        return build(layout, teacher_dir, optimizer=False)

    data = SupervisedData(rows=fitting(student, make_rows()))
    complete = partial(with_top_tokens, student, build_teacher, teacher_model=str(teacher_dir), k=K, directory=place)
    task = top_k_task(complete, kd_coef=KD_COEF, direction=direction)
    (found,) = task.complete([data])
    dist.barrier()
    (again,) = task.complete([data])
    assert np.array_equal(found.rows.fields[TOP_K], again.rows.fields[TOP_K])
    assert found.fingerprint == data.fingerprint, "a checkpoint continues with or without the file"
    with whole_gradients(student):
        denominator = task.denominator(found, np.arange(len(data.rows)))
        batches = student.micro_batches(found.rows)
        loss, metrics, _ = student.accumulate_gradients(batches, task.objective, denominator=denominator)
    return loss, metrics, parts(student, gradients=True)


def top_case(rank: int, world_size: int, init_method: str, layout: Layout, root: Path, place: Path) -> dict[str, Found]:
    """In each direction."""
    with world(layout, rank, init_method):
        student = build(layout, root / "student")
        found = {}
        for direction in DIRECTIONS:
            found[direction] = distil_top(student, root / "teacher", layout, direction, place / direction)
            dist.barrier()
        return found


def case(rank: int, world_size: int, init_method: str, layout: Layout, root: Path) -> dict[str, Found]:
    """In each direction."""
    with world(layout, rank, init_method):
        student = build(layout, root / "student")
        return {each: distil(student, build(layout, root / "teacher", optimizer=False), each) for each in DIRECTIONS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher is of another family, depth and width, has a soft cap, and tokens that the student has not."""
    root = tmp_path_factory.mktemp("distillation")
    make_model(root / "student", family="llama")
    make_model(root / "teacher", family="gemma2", seed=4, vocab_size=300, hidden_size=96, num_hidden_layers=8)
    return root


def by_transformers(models: Path, k: int | None) -> dict[str, tuple[float, dict[str, float], dict[str, Tensor]]]:
    """One row at a time, over the whole vocabulary or the teacher's k likeliest tokens and the others as one."""
    found: dict[str, Any] = {}
    for direction in DIRECTIONS:
        student, teacher = (  # the default leaves Gemma 2's attention without its soft cap
            AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
            for name in ("student", "teacher")
        )
        tokens: list[Tensor] = []
        for ids, prompt_length in sequences(make_rows()):
            given, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[prompt_length:])
            with torch.no_grad():
                q = teacher(given).logits[0, prompt_length - 1 :, :VOCAB_SIZE].log_softmax(-1)
            p = student(given).logits[0, prompt_length - 1 :].log_softmax(-1)
            chosen = -p.gather(-1, targets[:, None])[:, 0]
            if k is not None:
                top = q.topk(k, -1).indices
                p, q = (
                    torch.cat([x.gather(-1, top), x.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)], -1)
                    for x in (p, q)
                )
            kl = (q.exp() * (q - p)).sum(-1) if direction == "forward" else (p.exp() * (p - q)).sum(-1)
            tokens.append(torch.stack([chosen, kl, -(q.exp() * q).sum(-1)]))
        lm_loss, kl, entropy = torch.cat(tokens, 1).mean(1)
        loss = (1 - KD_COEF) * lm_loss + KD_COEF * (kl + entropy if direction == "forward" else kl)
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters()}
        means = {"lm_loss": lm_loss.item(), "kl": kl.item(), "teacher_entropy": entropy.item()}
        found[direction] = (loss.item(), means, gradients)
    return found


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[int | None, Any]:
    return {k: by_transformers(models, k) for k in (None, K)}


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("name", CASES)
def test_layouts(
    ranks: RankPool, models: Path, expected: dict[int | None, Any], tmp_path: Path, name: str, k: int | None
) -> None:
    layout = CASES[name]
    if k is None:
        by_rank = ranks.run(layout.world_size, case, layout, models)
    else:
        by_rank = ranks.run(layout.world_size, top_case, layout, models, tmp_path)
    for direction in DIRECTIONS:
        loss, metrics, gradients = expected[k][direction]
        assert metrics["kl"] > 0.1
        for found in by_rank:
            assert found[direction][0] == pytest.approx(loss, abs=1e-5)
            assert found[direction][1] == pytest.approx(metrics, abs=1e-5)
        whole = assemble([found[direction][2] for found in by_rank])
        assert whole.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(whole[key], gradient, atol=2e-6, rtol=1e-4, msg=key)
