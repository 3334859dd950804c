"""Direct preference optimisation of pairs: DPO, cDPO and IPO."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.algos.preferences import dpo_loss
from megarlhf.config.supervised_arguments import DPOConfig
from megarlhf.data.types import MicroBatch
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.engine.sequences import sequence_sums
from megarlhf.trainers.reference import REF_LOG_PROBS, reference_log_probs, with_reference_log_probs
from megarlhf.trainers.supervised import SupervisedTask


def dpo_task(config: DPOConfig, engine: MegatronEngine) -> SupervisedTask:
    """Its objective, over pairs of rows, with the engine's present weights, or those of ref_pretrain, as reference."""
    options = config.dpo
    objective = dpo_objective(
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        ipo=options.ipo,
        nll_loss_coef=options.nll_loss_coef,
    )
    task = SupervisedTask(name="dpo", objective=objective, mean_over="units", prepare=reference_log_probs(engine))
    if options.precompute_ref_log_probs:
        directory = Path(config.logging.save).parent
        complete = partial(with_reference_log_probs, engine, ref_pretrain=options.ref_pretrain, directory=directory)
        return replace(task, complete=complete)
    engine.keep_reference(options.ref_pretrain, stays=config.keeps_resident)
    return task


def dpo_objective(*, beta: float, label_smoothing: float, ipo: bool, nll_loss_coef: float) -> Objective:
    """The loss of each pair, summed; of its two rows that with the even number is chosen.

    Args:
        nll_loss_coef: adds so much of the chosen answer's -log p, mean over its tokens, as Llama 3.1 does
            (arXiv:2407.21783 section 4.1.4).
    """

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert outputs.log_probs is not None
        rows, log_ratios = sequence_sums(outputs.log_probs - batch.fields[REF_LOG_PROBS], batch)
        _, log_probs = sequence_sums(outputs.log_probs, batch)
        _, lengths = sequence_sums(torch.ones_like(outputs.log_probs), batch)
        order = rows.argsort()
        first, second = order[0::2], order[1::2]
        assert (rows[first] % 2 == 0).all() and (rows[first] + 1 == rows[second]).all(), "chosen first, in pairs"
        losses = dpo_loss(log_ratios[first], log_ratios[second], beta=beta, label_smoothing=label_smoothing, ipo=ipo)
        total = losses.sum() - nll_loss_coef * (log_probs / lengths)[first].sum()
        chosen, rejected = beta * log_ratios[first].detach(), beta * log_ratios[second].detach()
        pairs = len(first)
        return total, {
            "accuracy": ((chosen > rejected).sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "chosen_reward": (chosen.sum(), pairs),
            "rejected_reward": (rejected.sum(), pairs),
            "chosen_log_prob": (log_probs[first].detach().sum(), lengths[first].sum()),
            "rejected_log_prob": (log_probs[second].detach().sum(), lengths[second].sum()),
        }

    names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob")
    return Objective(loss=loss, metric_names=names)
