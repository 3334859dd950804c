"""The reward model of `megarlhf serve-rm`, on Megatron ranks of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

from megarlhf.cli.errors import all_or_errors, running
from megarlhf.cli.reward_models import OpenedModels, opened_models, running_models
from megarlhf.cli.rewards import model_sources
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.reward.model import RewardModel
from megarlhf.reward.texts import ModelTextScorer


def model_scorer(config: ServeConfig) -> tuple[ModelTextScorer, OpenedModels]:
    """The reward model on ranks of its own, which start when the scorer is opened, and their plan.

    Raises:
        ConfigError: whatever is wrong with the model's files, kernels, devices and memory.
    """
    ppo = config.as_ppo()
    (source,) = model_sources(ppo)
    models, _ = all_or_errors([partial(opened_models, ppo), source.check])
    tokenizer = load_tokenizer(source.directory, chat_template=None)
    return ModelTextScorer(source, tokenizer, _started(models, source)), models


@contextmanager
def _started(models: OpenedModels, source: RewardModel) -> Iterator[None]:
    config = models.config
    with TemporaryDirectory(prefix="megarlhf-logs-") as logs, running():
        with_logs = replace(config, logging=replace(config.logging, save=logs))
        with running_models(models._replace(config=with_logs), [source]):
            yield
