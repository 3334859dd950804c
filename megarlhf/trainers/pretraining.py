"""The pretraining loss beside the policy's: PPO-ptx of InstructGPT, arXiv:2203.02155 equation 2."""

from dataclasses import replace
from pathlib import Path

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.sampling import PromptSampler
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import MicroBatch
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import LossTerm, Objective, OutputLayer, TokenOutputs
from megarlhf.engine.schedule import target_log_probs
from megarlhf.parallel.truncation import Truncation
from megarlhf.trainers.sft import sft_objective


def pretraining_directory(config: PPOConfig) -> Path:
    """Where the driver puts the data in tokens, for all ranks to map."""
    return Path(config.logging.save).absolute() / "pretrain_data"


class PretrainingLoss:
    """ptx_coef times the mean cross-entropy of a batch of documents, for each optimizer step of an engine.

    Which documents a step draws follows from the number of steps that the engine's schedule has counted, which its
    checkpoint holds: a refused step draws the same again, and a resumed run goes on where it was.

    Args:
        batch_size: documents in an optimizer step, over all ranks.
    """

    def __init__(
        self, engine: MegatronEngine, data: SupervisedData, *, coef: float, batch_size: int, seed: int
    ) -> None:
        self._engine, self._data, self._coef = engine, data, coef
        self._sampler = PromptSampler(data.num_units, batch_size, seed)
        self._objective = pretraining_objective()

    def next_term(self) -> LossTerm:
        """Of the next optimizer step; every rank calls it and reads its own documents."""
        part, rows = self._data.of_units(self._sampler.batch(self._engine.scheduler.num_steps))
        return LossTerm(
            name="ptx",
            batches=self._engine.micro_batches(part.rows, rows),
            objective=self._objective,
            denominator=float(part.rows.count_loss_targets(rows)),
            coef=self._coef,
        )


def pretraining_objective() -> Objective:
    """-log p of each target, summed, of the whole distribution at temperature 1 however the rollout samples."""

    def outputs(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        distribution = replace(layer.distribution, temperature=1.0, truncation=Truncation())
        return target_log_probs(replace(layer, distribution=distribution), batch)

    return replace(sft_objective(), outputs=outputs)
