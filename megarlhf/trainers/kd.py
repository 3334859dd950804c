"""Knowledge distillation: a teacher's distribution of each target token beside the token itself.

The teacher is a second engine in the same processes and layout, of any depth, width and family. Before each step it
gives the hidden states that its output layer takes; its logits exist chunk by chunk, beside the student's. Or it names
its likeliest tokens once, before training.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.algos.distillation import bucket_divergence, distillation_loss
from megarlhf.data.packing import add_values
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Floats, Ints, MicroBatch, TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Metrics, Objective, OutputLayer, Outputs, TokenOutputs
from megarlhf.engine.schedule import hidden_outputs
from megarlhf.models.heads import frozen_output_weight, output_weight
from megarlhf.parallel.device import release_memory
from megarlhf.parallel.distillation import Direction, TeacherLayer, vocab_parallel_distillation
from megarlhf.parallel.top_tokens import vocab_parallel_bucket_log_probs, vocab_parallel_top_tokens
from megarlhf.parallel.vocab import OutputDistribution
from megarlhf.trainers.precomputed import checkpoint_digest, computed, with_field
from megarlhf.trainers.supervised import SupervisedTask

OutputOf = Callable[[OutputLayer], tuple[Tensor, OutputDistribution]]  # the teacher's output layer beside a student's
Complete = Callable[[list[SupervisedData]], list[SupervisedData]]
TOP_K = "teacher_top_k"  # field: [targets, 2k + 1] ids, their log-probs, and that of all other tokens
HIDDEN = "teacher_hidden"  # field: [targets, h] what the teacher's output layer takes


def kd_task(engine: MegatronEngine, teacher: MegatronEngine, *, kd_coef: float, direction: Direction) -> SupervisedTask:
    """The objective, and the teacher's pass over each step's rows.

    Outside of that pass the teacher waits on the host; a copy of its output layer's weights stays on the device.

    Args:
        teacher: without an optimizer; it has at least the student's vocabulary, of which further tokens are left out.
    """
    weight: Tensor | None = None
    if engine.ranks.is_last_stage:
        weight = frozen_output_weight(teacher.chunks[-1], num_rows=len(output_weight(engine.chunks[-1])))
    of = replace(teacher.distribution, vocab_size=engine.distribution.vocab_size)
    teacher.sleep("parameters")

    def output_of(layer: OutputLayer) -> tuple[Tensor, OutputDistribution]:
        assert weight is not None, "only the last stage computes outputs"
        return weight, of

    def prepare(data: SupervisedData, rows: Ints, batches: list[MicroBatch]) -> list[MicroBatch]:
        teacher.wake("parameters")
        hidden = teacher.forward(batches, compute=hidden_outputs)
        teacher.memory.sleep("parameters", changed=False)
        return add_values(batches, HIDDEN, hidden)

    objective = kd_objective(teacher_outputs(output_of, direction), kd_coef=kd_coef, direction=direction)
    return SupervisedTask(name="kd", objective=objective, prepare=prepare)


def top_k_task(complete: Complete, *, kd_coef: float, direction: Direction) -> SupervisedTask:
    """The same from the teacher's likeliest tokens, which `complete` adds to the data before training."""
    objective = kd_objective(top_k_outputs(direction), kd_coef=kd_coef, direction=direction)
    return SupervisedTask(name="kd", objective=objective, complete=complete)


def with_top_tokens(
    engine: MegatronEngine,
    build_teacher: Callable[[], MegatronEngine],
    data: Sequence[SupervisedData],
    *,
    teacher_model: str,
    k: int,
    directory: Path,
) -> list[SupervisedData]:
    """Data with the field `teacher_top_k`: of each target the ids of the teacher's k likeliest tokens, and their
    log-probs and that of all others together. From a file in `directory`, or by a teacher, which then goes.

    Raises:
        OSError, ValueError: as with_field does.
    """
    tokens, width, built = engine.distribution.vocab_size, 2 * k + 1, list[MegatronEngine]()

    def top_tokens(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        of = replace(layer.distribution, vocab_size=tokens)
        ids, log_probs = vocab_parallel_top_tokens(layer.hidden, layer.weight, k, of=of, group=layer.group)
        found = torch.cat([ids.float(), log_probs], -1)  # float32 holds ids up to 2^24
        return TokenOutputs(candidates=layer.on_sequence(found, len(batch.targets)))

    def compute(rows: TrainingRows) -> Iterator[Floats]:
        if not built:
            built.append(build_teacher())
        return computed(built[0], rows, width=width, compute=top_tokens)

    model = checkpoint_digest(teacher_model, engine, f"top {k} of {tokens}")
    completed = with_field(data, TOP_K, compute, width=width, model=model, directory=directory)
    built.clear()
    gc.collect()
    release_memory()
    return completed


def top_k_outputs(direction: Direction) -> Outputs:
    """Divergence over the tokens of the field `teacher_top_k` and all others as one."""

    def outputs(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        given = batch.fields[TOP_K][layer.places]
        k, length = given.shape[1] // 2, len(batch.targets)
        log_probs, buckets = vocab_parallel_bucket_log_probs(
            layer.hidden,
            layer.weight,
            batch.targets[layer.places],
            given[:, :k].long(),
            of=layer.distribution,
            group=layer.group,
        )
        divergence, entropy = bucket_divergence(buckets, given[:, k:], direction=direction)
        found = (layer.on_sequence(values, length) for values in (log_probs, divergence, entropy))
        return TokenOutputs(**dict(zip(("log_probs", "divergence", "teacher_entropy"), found, strict=True)))

    return outputs


def teacher_outputs(output_of: OutputOf, direction: Direction) -> Outputs:
    """Divergence from the distributions of a teacher, whose hidden states are the field `teacher_hidden`."""

    def outputs(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        weight, of = output_of(layer)
        found = vocab_parallel_distillation(
            layer.hidden,
            layer.weight,
            batch.targets[layer.places],
            of=layer.distribution,
            teacher=TeacherLayer(hidden=batch.fields[HIDDEN][layer.places].to(weight.dtype), weight=weight, of=of),
            direction=direction,
            group=layer.group,
        )
        log_probs, divergence, entropy = (layer.on_sequence(values, len(batch.targets)) for values in found)
        return TokenOutputs(log_probs=log_probs, divergence=divergence, teacher_entropy=entropy)

    return outputs


def kd_objective(outputs: Outputs, *, kd_coef: float, direction: Direction) -> Objective:
    """distillation_loss of each target, summed; the engine divides by the number of targets in the global batch."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        given = (outputs.log_probs, outputs.divergence, outputs.teacher_entropy)
        log_probs, divergence, entropy = (values[batch.target_mask] for values in given if values is not None)
        tokens = distillation_loss(log_probs, divergence, entropy, kd_coef=kd_coef, direction=direction)
        means = {"lm_loss": -log_probs, "kl": divergence, "teacher_entropy": entropy}
        return tokens.sum(), {name: (values.detach().sum(), len(values)) for name, values in means.items()}

    return Objective(loss=loss, metric_names=("lm_loss", "kl", "teacher_entropy"), outputs=outputs)
