"""Kahneman-Tversky optimisation of single answers with a label, desirable or not."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.algos.preferences import kto_loss
from megarlhf.config.supervised_arguments import KTOArguments
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Ints, MicroBatch
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.engine.sequences import sequence_sums
from megarlhf.parallel.device import current_device
from megarlhf.trainers.reference import REF_LOG_PROBS, reference_log_probs
from megarlhf.trainers.supervised import SupervisedTask


def kto_task(options: KTOArguments, engine: MegatronEngine) -> SupervisedTask:
    """Its objective, over rows of one unit each, with the engine's present weights as reference."""
    engine.keep_reference(stays=not options.ref_offload)
    add_reference = reference_log_probs(engine)

    def prepare(data: SupervisedData, rows: Ints, batches: list[MicroBatch]) -> list[MicroBatch]:
        return with_reference_point(add_reference(data, rows, batches), unmatched_kl(engine, data, rows))

    objective = kto_objective(
        beta=options.beta,
        desirable_loss_weight=options.desirable_loss_weight,
        undesirable_loss_weight=options.undesirable_loss_weight,
    )
    return SupervisedTask(name="kto", objective=objective, mean_over="units", prepare=prepare, metrics=with_margin)


def unmatched_kl(engine: MegatronEngine, data: SupervisedData, rows: Ints) -> float:
    """max(0, mean log-ratio of these rows' prompts with other rows' answers), over all ranks and micro-batches.

    The estimate of arXiv:2402.01306 section 4.1 for the KL of the policy to the reference; every rank calls it.
    """
    assert data.unmatched is not None
    batches = engine.micro_batches(data.unmatched, rows)
    policy = engine.forward(batches).values
    with engine.reference_weights():
        log_ratios = policy - engine.forward(batches).values
    total = torch.zeros((), dtype=torch.float64, device=current_device())
    if engine.ranks.holds_results:
        total += float(log_ratios.sum(dtype="float64"))
    dist.all_reduce(total)
    return max(0.0, float(total) / len(rows))


def with_reference_point(batches: list[MicroBatch], kl: float) -> list[MicroBatch]:
    """Packed sequences with the field `kl`, the same number at every position."""
    return [replace(batch, fields=batch.fields | {"kl": torch.full((len(batch.tokens),), kl)}) for batch in batches]


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """Metrics, with the margin where there are answers of both labels."""
    if not {"desirable_reward", "undesirable_reward"} <= means.keys():
        return means
    return means | {"margin": means["desirable_reward"] - means["undesirable_reward"]}


def kto_objective(*, beta: float, desirable_loss_weight: float, undesirable_loss_weight: float) -> Objective:
    """The loss of each row, summed; the field `desirable`, 1 or 0, has its label, and `kl` the reference point."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert outputs.log_probs is not None
        _, log_ratios = sequence_sums(outputs.log_probs - batch.fields[REF_LOG_PROBS], batch)
        _, lengths = sequence_sums(torch.ones_like(outputs.log_probs), batch)
        desirable = sequence_sums(batch.fields["desirable"], batch)[1] > 0
        kl = sequence_sums(batch.fields["kl"], batch)[1] / lengths
        losses = kto_loss(
            log_ratios,
            desirable,
            kl,
            beta=beta,
            desirable_loss_weight=desirable_loss_weight,
            undesirable_loss_weight=undesirable_loss_weight,
        )
        distances = log_ratios.detach() - kl
        rewards = beta * log_ratios.detach()
        return losses.sum(), {
            "accuracy": (torch.where(desirable, distances > 0, distances < 0).sum(), len(rewards)),
            "desirable_reward": (rewards[desirable].sum(), desirable.sum()),
            "undesirable_reward": (rewards[~desirable].sum(), (~desirable).sum()),
            "kl": (kl.sum(), len(rewards)),
        }

    return Objective(loss=loss, metric_names=("accuracy", "desirable_reward", "undesirable_reward", "kl"))
