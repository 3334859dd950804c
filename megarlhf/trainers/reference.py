"""Log-probs of a reference beside the rows that are trained on: in each step, or once before training."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from megarlhf.data.packing import add_values
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Floats, Ints, MicroBatch, TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.precomputed import checkpoint_digest, computed, with_field
from megarlhf.trainers.supervised import Prepare

REF_LOG_PROBS = "ref_log_probs"


def reference_log_probs(engine: MegatronEngine) -> Prepare:
    """Adds the field of that name, computed by the engine's reference unless the data has it."""

    def prepare(data: SupervisedData, rows: Ints, batches: list[MicroBatch]) -> list[MicroBatch]:
        if REF_LOG_PROBS in data.rows.fields:
            return batches
        with engine.reference_weights():
            return add_values(batches, REF_LOG_PROBS, engine.forward(batches))

    return prepare


def with_reference_log_probs(
    engine: MegatronEngine, data: Sequence[SupervisedData], *, ref_pretrain: str | None, directory: Path
) -> list[SupervisedData]:
    """Data with the field of that name, of an earlier run's file or computed into one (`precomputed.with_field`).

    Every rank calls it, while the engine's weights are still the start's.

    Args:
        ref_pretrain: checkpoint of the reference; None: the engine's present weights, which are those of its pretrain.
        directory: where the files lie.
    Raises:
        OSError, ValueError: as with_field does.
    """
    if ref_pretrain is not None:
        engine.keep_reference(ref_pretrain)

    def compute(rows: TrainingRows) -> Iterator[Floats]:
        with nullcontext() if ref_pretrain is None else engine.reference_weights():
            yield from computed(engine, rows, width=None)

    quantised = engine.adapters is not None and engine.adapters.options.load_in_4bit
    model = checkpoint_digest(ref_pretrain or engine.pretrain, engine, *(["4 bits"] if quantised else []))
    completed = with_field(data, REF_LOG_PROBS, compute, width=None, model=model, directory=directory)
    if ref_pretrain is not None:
        engine.drop_reference()
    return completed
