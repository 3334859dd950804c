"""DPO and KTO against TRL's trainers, on the same weights and tokens.

Where TRL departs from the definitions the definition is tested instead (tests/algos/test_preferences.py): its IPO
divides each answer's log-ratio by its tokens, it has no cDPO, and its KTO takes a reference point for each micro-batch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from megarlhf.config.supervised_arguments import KTOArguments
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.dpo import dpo_objective
from megarlhf.trainers.kto import kto_task
from megarlhf.trainers.reference import reference_log_probs
from megarlhf.trainers.supervised import SupervisedTask
from tests.data.conftest import tokenizer  # noqa: F401
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

Batch = dict[str, torch.Tensor]
BETA, WEIGHTS = 0.3, (1.3, 0.7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference, which are far from each other."""
    root = tmp_path_factory.mktemp("trl")
    made = [make_model(root / name, seed=seed, vocab_size=300) for seed, name in enumerate(("policy", "reference"))]
    return made[0], made[1]


def trainer(kind: type, config: type, models: tuple[Path, Path], data: list[dict[str, Any]], **more: Any) -> Any:
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models)
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    arguments = config(output_dir=str(models[0].parent / "out"), beta=BETA, **quiet, **more.pop("arguments", {}))
    rows = Dataset.from_list(data)
    return kind(model=policy, ref_model=reference, args=arguments, train_dataset=rows, **more)


def rows_of(batch: Batch, prefix: str = "") -> TrainingRows:
    """The sequences of a batch of TRL's without its padding."""
    lengths = batch[f"{prefix}attention_mask"].sum(1).tolist()
    ids = [row[:length].tolist() for row, length in zip(batch[f"{prefix}input_ids"], lengths, strict=True)]
    answers = batch[f"{prefix}completion_mask"].sum(1).tolist()
    return training_rows(ids, [length - answer for length, answer in zip(lengths, answers, strict=True)])


def loss_of(task: SupervisedTask, engine: MegatronEngine, data: SupervisedData) -> float:
    every = np.arange(len(data.rows))
    batches = task.prepare(data, every, engine.micro_batches(data.rows, every))
    return engine.evaluate(batches, task.objective)[0] / task.denominator(data, every)


def dpo_case(
    rank: int, world_size: int, init_method: str, layout: Layout, models: tuple[Path, Path], rows: TrainingRows
) -> float:
    with world(layout, rank, init_method):
        engine = build(layout, models[0])
        engine.keep_reference(models[1])
        objective = dpo_objective(beta=BETA, label_smoothing=0.0, ipo=False, nll_loss_coef=0.0)
        prepare = reference_log_probs(engine)
        task = SupervisedTask(name="dpo", objective=objective, mean_over="units", prepare=prepare)
        return loss_of(task, engine, SupervisedData(rows=rows))


def kto_case(
    rank: int, world_size: int, init_method: str, layout: Layout, models: tuple[Path, Path], data: SupervisedData
) -> float:
    with world(layout, rank, init_method):
        engine = build(layout, models[0])
        options = KTOArguments(beta=BETA, desirable_loss_weight=WEIGHTS[0], undesirable_loss_weight=WEIGHTS[1])
        task = kto_task(options, engine)
        engine.keep_reference(models[1])
        return loss_of(task, engine, data)


@pytest.mark.parametrize("name", ["single", "share-prefix-TP2-SP"])
def test_dpo_loss_is_trls(
    ranks: RankPool,
    models: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    name: str,
) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    data = [{"prompt": f"{n} plus", "chosen": "abc" * (n % 3 + 1), "rejected": "xy" * (n % 4 + 1)} for n in range(6)]
    theirs = trainer(DPOTrainer, DPOConfig, models, data, processing_class=tokenizer)
    batch = theirs.data_collator([theirs.train_dataset[n] for n in range(6)])
    expected = theirs.compute_loss(theirs.model, batch).item()
    rows = rows_of(batch).take([place for n in range(6) for place in (n, n + 6)])  # theirs: all chosen first
    rows = replace(rows, unit_ids=np.repeat(np.arange(6), 2))
    layout = SINGLE if name == "single" else LAYOUTS[name]
    for found in ranks.run(layout.world_size, dpo_case, layout, models, rows):
        assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected - np.log(2)) > 0.05


def test_kto_loss_is_trls(
    ranks: RankPool,
    models: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    data = [{"prompt": f"{n} is", "completion": "abcde"[n % 5] * (n + 1), "label": n % 3 == 0} for n in range(6)]
    weights = {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1], "per_device_train_batch_size": 6}
    theirs = trainer(KTOTrainer, KTOConfig, models, data, processing_class=tokenizer, arguments=weights)
    batch = theirs.data_collator([theirs.train_dataset[n] for n in range(6)])
    expected = theirs.compute_loss(theirs.model, batch).item()
    labels = batch["label"].float().numpy()
    unmatched = rows_of(batch, "KL_")
    rows = rows_of(batch).with_fields({}, scalars={"desirable": labels})
    given = SupervisedData(rows=rows, unmatched=unmatched)
    for layout in (SINGLE, LAYOUTS["DP2"]):
        for found in ranks.run(layout.world_size, kto_case, layout, models, given):
            assert found == pytest.approx(expected, abs=1e-5)
