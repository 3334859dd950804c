"""Reference log-probs and KTO's reference point in several layouts, against Transformers one row at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megarlhf.config.supervised_arguments import KTOArguments
from megarlhf.data.packing import gather_targets
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers import precomputed
from megarlhf.trainers.kto import kto_task, unmatched_kl
from megarlhf.trainers.parity_cases import parity_case
from megarlhf.trainers.reference import REF_LOG_PROBS, reference_log_probs, with_reference_log_probs
from tests.distributed.cases import by_row, make_rows, sequences
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

NAMES = ("single", "DP2-distopt", "PP2", "CP2-p2p", "share-prefix-TP2-SP")


def pairs() -> TrainingRows:
    """Three pairs with reference log-probs of their own left out."""
    rows = make_rows()
    made = parity_case("dpo").rows
    assert made is not None
    kept = made(rows)
    return TrainingRows(
        input_ids=kept.input_ids, lengths=kept.lengths, prompt_lengths=kept.prompt_lengths, unit_ids=kept.unit_ids
    )


def labelled() -> SupervisedData:
    """Six answers, and others in place of them: those of the rows turned by two."""
    rows = pairs()
    unmatched = rows.take([2, 3, 4, 5, 0, 1])
    alone = {"unit_ids": np.arange(6)}
    kept, others = (replace(each, **alone) for each in (rows, unmatched))
    return SupervisedData(rows=kept.with_fields({}, scalars={"desirable": np.float32([1, 0] * 3)}), unmatched=others)


def case(
    rank: int, world_size: int, init_method: str, layout: Layout, policy: Path, reference: Path, cache: Path
) -> dict[str, Any]:
    """What a rank finds: by the field's name the reference's log-probs by row, and the reference point."""
    with world(layout, rank, init_method):
        engine = build(layout, policy)
        engine.keep_reference(reference)
        rows, every = pairs(), np.arange(6)
        found: dict[str, Any] = {"kl": unmatched_kl(engine, labelled(), every)}
        found["kl of some"] = unmatched_kl(engine, labelled(), every[3:5])
        found["kl below 0"] = unmatched_kl(engine, labelled(), every[1:3])
        prepare = reference_log_probs(engine)
        found["ref"] = {}
        for indices in (every[:2], every[2:]):  # one pair alone: a data-parallel rank has none
            batches = prepare(SupervisedData(rows=rows), indices, engine.micro_batches(rows, indices))
            if engine.ranks.is_last_stage:
                assert all(REF_LOG_PROBS in batch.fields for batch in batches)
                for batch in batches:
                    found["ref"] |= by_row(rows, gather_targets(batch, batch.fields[REF_LOG_PROBS]))
        engine.drop_reference()
        found["own"] = by_row(rows, engine.forward(engine.micro_batches(rows)))
        data = SupervisedData(rows=rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precomputed, "UNITS_AT_ONCE", 2)  # of three
            (completed,) = with_reference_log_probs(engine, [data], ref_pretrain=str(reference), directory=cache)
        found["once"] = completed.rows.fields[REF_LOG_PROBS]
        assert engine._reference is None and completed.fingerprint == data.fingerprint
        (of_start,) = with_reference_log_probs(engine, [data], ref_pretrain=None, directory=cache)
        found["of the start"] = of_start.rows.fields[REF_LOG_PROBS]
        return found


def task_case(rank: int, world_size: int, init_method: str, layout: Layout, policy: Path) -> tuple[float, float]:
    """KTO's loss before and after steps with data whose reference point is not 0, by the task alone."""
    with world(layout, rank, init_method):
        engine = build(layout, policy)
        task, data, rows = kto_task(KTOArguments(beta=0.5), engine), labelled(), np.arange(6)
        for _ in range(3):
            batches = task.prepare(data, rows, engine.micro_batches(data.rows, rows))
            result = engine.step(batches, task.objective, denominator=task.denominator(data, rows))
        return result.loss, task.metrics(result.metrics)["kl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("reference")
    return make_model(root / "policy", family="llama", seed=1), make_model(root / "reference", family="llama", seed=2)


def log_probs(directory: Path, rows: TrainingRows) -> list[torch.Tensor]:
    """[targets] of each row."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    for tokens, prompt_length in sequences(rows):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            whole = model(ids[:, :-1]).logits[0, prompt_length - 1 :].log_softmax(-1)
        found.append(whole.gather(-1, ids[0, prompt_length:, None])[:, 0])
    return found


def test_reference_is_the_other_model_in_every_layout(
    ranks: RankPool, models: tuple[Path, Path], tmp_path: Path
) -> None:
    own, reference = (log_probs(directory, pairs()) for directory in models)
    others = labelled().unmatched
    assert others is not None
    sums = [float((a - b).sum()) for a, b in zip(*(log_probs(directory, others) for directory in models), strict=True)]
    assert sums[1] + sums[2] < -1
    for name in NAMES:
        layout = SINGLE if name == "single" else LAYOUTS[name]
        results = ranks.run(layout.world_size, case, layout, *models, tmp_path / name)
        for found in results:
            assert found["kl"] == pytest.approx(max(0.0, sum(sums) / 6), abs=1e-4), name
            assert found["kl of some"] == pytest.approx(max(0.0, (sums[3] + sums[4]) / 2), abs=1e-4), name
            assert found["kl below 0"] == 0, name
            np.testing.assert_allclose(found["once"], torch.cat(reference), atol=1e-5)
            np.testing.assert_allclose(found["of the start"], torch.cat(own), atol=1e-5)
        for key, wanted in (("ref", reference), ("own", own)):
            rows = {row: values for found in results for row, values in found[key].items()}
            for row, values in enumerate(wanted):
                torch.testing.assert_close(rows[row], values, atol=1e-5, rtol=0)
        assert len(list((tmp_path / name).iterdir())) == 2, "one file for each reference"


def test_a_second_run_reads_what_the_first_has_written(
    ranks: RankPool, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also in another layout; another first row of a tensor, or other data is another file."""
    policy, _ = models
    first = ranks.run(1, cached_case, SINGLE, policy, tmp_path, 6)[0]
    assert first > 0
    assert ranks.run(2, cached_case, LAYOUTS["DP2"], policy, tmp_path, 6) == [0, 0]
    assert ranks.run(1, cached_case, SINGLE, policy, tmp_path, 4)[0] > 0
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in policy.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    weights = changed / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, metadata={"format": "pt", "other": "bytes"})
    assert ranks.run(1, cached_case, SINGLE, changed, tmp_path, 6) == [0], "the same numbers in another file"
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert ranks.run(1, cached_case, SINGLE, changed, tmp_path, 6)[0] > 0
    (broken, *_) = tmp_path.glob("*.npy")
    np.save(broken, np.zeros(3, dtype=np.float32))
    with pytest.raises(Exception, match="not the data's float32 .*: remove it"):
        for number in (6, 4):
            ranks.run(1, cached_case, SINGLE, policy, tmp_path, number)
        ranks.run(1, cached_case, SINGLE, changed, tmp_path, 6)


def cached_case(
    rank: int, world_size: int, init_method: str, layout: Layout, policy: Path, cache: Path, number: int
) -> int:
    """How often the engine computes for the first so many rows."""
    with world(layout, rank, init_method):
        engine = build(layout, policy)
        calls, forward = list[int](), engine.forward

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return forward(*arguments, **options)

        engine.forward = counted  # type: ignore[method-assign]
        data = SupervisedData(rows=pairs().take(range(number)))
        with_reference_log_probs(engine, [data], ref_pretrain=None, directory=cache)
        return len(calls)


def repeated_case(rank: int, world_size: int, init_method: str, policy: Path, reference: Path) -> list[float]:
    """DPO's loss and metrics of two pairs, of which one comes twice, and of that one alone and of the other alone."""
    with world(SINGLE, rank, init_method):
        engine, found = build(SINGLE, policy), list[float]()
        engine.keep_reference(reference)
        data, prepare = SupervisedData(rows=pairs()), reference_log_probs(engine)
        for units in ([0, 2, 0], [0], [2]):
            rows = data.rows.of_units(units)
            batches = prepare(data, rows, engine.micro_batches(data.rows, rows))
            found.append(engine.evaluate(batches, parity_case("dpo").objective)[0])
        return found


def test_a_pair_that_comes_twice_in_a_batch_counts_twice(ranks: RankPool, models: tuple[Path, Path]) -> None:
    """As where a batch holds the end of an epoch and the start of the next."""
    ((together, first, second),) = ranks.run(1, repeated_case, *models)
    assert together == pytest.approx(2 * first + second, rel=1e-5)


def test_kto_takes_the_same_steps_in_every_layout(ranks: RankPool, models: tuple[Path, Path]) -> None:
    expected = ranks.run(1, task_case, SINGLE, models[0])[0]
    assert expected[1] > 0.01, "the reference point is felt"
    for name in ("DP2", "PP2", "CP2-p2p", "unpacked"):
        for found in ranks.run(LAYOUTS[name].world_size, task_case, LAYOUTS[name], models[0]):
            assert found == pytest.approx(expected, abs=2e-5), name


def test_another_architecture_is_refused(ranks: RankPool, models: tuple[Path, Path], tmp_path: Path) -> None:
    smaller = make_model(tmp_path / "smaller", family="llama", intermediate_size=64)
    for directory, message in ((smaller, "has shape"), (make_model(tmp_path / "tied", tied=True), "tie_word")):
        with pytest.raises(Exception, match=message):
            ranks.run(1, refused_case, models[0], directory)


def refused_case(rank: int, world_size: int, init_method: str, policy: Path, reference: Path) -> None:
    with world(SINGLE, rank, init_method):
        engine: MegatronEngine = build(SINGLE, policy)
        engine.keep_reference(reference)
