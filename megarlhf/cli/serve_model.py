"""The reward model of `megarlhf serve-rm`, on Megatron ranks of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory

from megarlhf.cli.errors import all_or_errors, running
from megarlhf.cli.rewards import model_sources
from megarlhf.cli.run_score import check_reward_models, running_models
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.reward.model import RewardModel
from megarlhf.reward.sources import SumOfSources
from megarlhf.reward.texts import ModelTextScorer


def model_scorer(config: ServeConfig) -> ModelTextScorer:
    """The reward model on ranks of its own, which start when the scorer is opened.

    Raises:
        ConfigError: files of the model, kernels or a placement that cannot be used.
    """
    ppo = config.as_ppo()
    (source,) = model_sources(ppo)
    all_or_errors([partial(check_reward_models, ppo), source.check])
    tokenizer = load_tokenizer(source.directory, chat_template=None)
    return ModelTextScorer(source, tokenizer, _started(config, source))


@contextmanager
def _started(config: ServeConfig, source: RewardModel) -> Iterator[None]:
    with (
        TemporaryDirectory(prefix="megarlhf-logs-") as logs,
        running(),
        running_models(SumOfSources([source]), config.as_ppo(save=logs)),
    ):
        yield
