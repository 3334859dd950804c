"""PPO-ptx: one optimizer step on the policy loss and the pretraining loss, each with its own denominator."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megarlhf.data.supervised import SupervisedData
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import LossTerm, NonFiniteError
from megarlhf.parallel.truncation import Truncation
from megarlhf.trainers.parity import whole_gradients
from megarlhf.trainers.parity_cases import fitting, parity_case, parity_rows
from megarlhf.trainers.pretraining import PretrainingLoss
from tests.distributed.cases import Parts, assemble, build_for, make_rows, parts
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import VOCAB_SIZE, make_model

COEF, BATCH, SEED = 0.7, 4, 9
# More documents than an optimizer step draws, longer than any of the policy's rows.
DOCUMENTS = parity_rows(VOCAB_SIZE, longest=40, seed=11)


def documents() -> SupervisedData:
    number = len(DOCUMENTS)
    rows = DOCUMENTS.take(np.arange(number))
    ids = {"prompt_lengths": np.ones(number, dtype=np.int64), "unit_ids": np.arange(number)}
    return SupervisedData(rows=type(rows)(input_ids=rows.input_ids, lengths=rows.lengths, **ids))


def drawn(step: int) -> list[list[int]]:
    """Tokens of the documents of an optimizer step, counted from 0, by the rule of the data's order."""
    count = len(DOCUMENTS)
    epochs = [torch.randperm(count, generator=torch.Generator().manual_seed(SEED + epoch)) for epoch in range(3)]
    line = torch.cat(epochs)[BATCH * step : BATCH * (step + 1)]
    ids = np.split(DOCUMENTS.input_ids, np.cumsum(DOCUMENTS.lengths)[:-1])
    return [ids[index].tolist() for index in line.tolist()]


def pretraining(engine: MegatronEngine) -> PretrainingLoss:
    return PretrainingLoss(engine, documents(), coef=COEF, batch_size=BATCH, seed=SEED)


def gradients_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path
) -> tuple[Parts, Parts, float, float, dict[str, float]]:
    """Gradients of both terms together and of the policy alone, and what each reports."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, temperature=0.7, truncation=Truncation(top_p=0.6))
        case, rows = parity_case("actor"), fitting(engine, make_rows())
        batches, denominator = engine.micro_batches(rows), case.denominator(rows)
        for chunk in engine.model:
            chunk.force_all_reduce = True  # what is reduced during the backward pass is left whole too

        def policy(beside: Sequence[LossTerm]) -> tuple[float, dict[str, float], Parts, np.ndarray]:
            with whole_gradients(engine):
                loss, metrics, outputs = engine.accumulate_gradients(
                    batches, case.objective, denominator=denominator, beside=beside
                )
            return loss, metrics, parts(engine, gradients=True), outputs.values

        alone, metrics, apart, expected = policy([])
        loss, found, together, outputs = policy([pretraining(engine).next_term()])
        assert set(found) - set(metrics) == {"ptx_loss"}
        assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
        return together, apart, loss, alone, found


def lm_gradients(model_dir: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean cross-entropy of the first step's documents by Transformers, a token's mean over all, and its gradient."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    texts, total = drawn(0), 0.0
    for ids in texts:
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        loss = loss / sum(len(each) - 1 for each in texts)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["TP2-SP", "PP2", "PP2-VPP2", "DP2-distopt-overlap", "CP2-p2p", "share-prefix"])
def test_gradient_is_the_sum_of_both_losses(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """The pretraining loss's is Transformers', of all tokens at temperature 1, the policy's of some of them at 0.7."""
    model_dir, layout = make_model(tmp_path / "model", family="llama"), LAYOUTS[name]
    expected_loss, expected = lm_gradients(model_dir)
    results = ranks.run(layout.world_size, gradients_case, layout, model_dir)
    together, apart = (assemble([result[place] for result in results]) for place in (0, 1))
    assert together.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for key, gradient in expected.items():
        torch.testing.assert_close(together[key] - apart[key], COEF * gradient, atol=1e-5, rtol=1e-4)
    for *_, loss, alone, metrics in results:
        assert loss == pytest.approx(alone, rel=1e-5), "the policy loss is reported without it"
        assert metrics["ptx_loss"] == pytest.approx(expected_loss, rel=1e-5)


def balanced_case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> list[Parts]:
    """Gradients of both terms and of each, with a load-balancing loss whose unit is the tokens of all of them."""
    with world(layout, rank, init_method):
        engine, case = build_for("actor", layout, model_dir), parity_case("actor")
        rows = fitting(engine, make_rows())
        term = pretraining(engine).next_term()
        policy = {"objective": case.objective, "denominator": case.denominator(rows)}
        found = []
        for batches, given, beside in (
            (engine.micro_batches(rows), policy, [term]),
            (engine.micro_batches(rows), policy, []),
            (term.batches, {"objective": term.objective, "denominator": term.denominator / COEF}, []),
        ):
            with whole_gradients(engine):
                engine.accumulate_gradients(batches, **given, beside=beside)
            found.append(parts(engine, gradients=True))
        return found


def test_experts_without_a_balance_loss(ranks: RankPool, tmp_path: Path) -> None:
    model_dir, layout = make_model(tmp_path / "model", family="mixtral"), MOE_LAYOUTS["EP2"]
    results = ranks.run(layout.world_size, balanced_case, layout, model_dir)
    together, policy, lm = (assemble([result[place] for result in results]) for place in range(3))
    for key in together:
        torch.testing.assert_close(together[key], policy[key] + lm[key], atol=2e-6, rtol=1e-4)


def steps_case(
    rank: int, world_size: int, init_method: str, model_dir: Path, directory: Path
) -> tuple[list[list[list[int]]], list[float]]:
    """Documents of the steps of a run that is refused a step, saved and continued; losses of both."""
    with world(SINGLE, rank, init_method):
        engine, case = build_for("actor", SINGLE, model_dir), parity_case("actor")
        rows, seen, losses = fitting(engine, make_rows()), list[list[list[int]]](), list[float]()

        def step(engine: MegatronEngine, denominator: float = 9.0) -> None:
            term = pretraining(engine).next_term()
            lines = [batch.tokens.tolist() for batch in term.batches]
            places = [batch.places for batch in term.batches]
            seen.append(
                [
                    line[first : first + count]
                    for line, place in zip(lines, places, strict=True)
                    for first, count in zip(place.positions.tolist(), place.lengths.tolist(), strict=True)
                ]
            )
            batches = engine.micro_batches(rows)
            result = engine.step(batches, case.objective, denominator=denominator, beside=[term])
            losses.append(result.metrics["ptx_loss"])

        step(engine)
        with pytest.raises(NonFiniteError):
            step(engine, denominator=float("nan"))
        step(engine)
        save_engine(engine, directory)
        step(engine)
        resumed = build_for("actor", SINGLE, model_dir)
        load_engine(resumed, directory)
        step(resumed)
        return seen, losses


def test_documents_follow_from_the_steps_made(ranks: RankPool, tmp_path: Path) -> None:
    """A refused step draws again, the fourth epoch's start meets the end of the one before, a resumed run goes on."""
    model_dir = make_model(tmp_path / "model", num_hidden_layers=1)
    seen, losses = ranks.run(1, steps_case, model_dir, tmp_path / "saved")[0]
    inputs = [sorted(ids[:-1] for ids in drawn(step)) for step in (0, 1, 1, 2, 2)]
    assert [sorted(step) for step in seen] == inputs
    assert len(losses) == 4 and losses[2] == losses[3] and len(set(losses[:3])) == 3
