"""The reward model of `megarlhf serve-rm`, on Megatron ranks of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from megarlhf.cli.errors import running
from megarlhf.cli.rewards import model_sources
from megarlhf.cli.run import check_weights, resolve_kernels
from megarlhf.cli.run_ppo import find_machine
from megarlhf.cli.run_score import running_models
from megarlhf.config.roles import reward_roles
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.reward.model import RewardModel
from megarlhf.reward.sources import SumOfSources
from megarlhf.reward.texts import ModelTextScorer


def model_scorer(config: ServeConfig) -> ModelTextScorer:
    """The reward model on ranks of its own, which start when the scorer is opened.

    Raises:
        ValueError: files of the model, or kernels, that cannot be used.
    """
    ppo = config.as_ppo()
    (role,), (source,) = reward_roles(ppo), model_sources(ppo)
    (option, directory), layout = role.start(ppo), role.layout(ppo)
    impl = resolve_kernels(ppo, {role.prefix: layout}, share_prompt_prefix=False, device=find_machine(ppo).kind)
    check_weights([(option, directory, layout, role.head)], transformer_impl=impl)
    source.check()
    return ModelTextScorer(source, load_tokenizer(directory, chat_template=None), _started(config, source))


@contextmanager
def _started(config: ServeConfig, source: RewardModel) -> Iterator[None]:
    with (
        TemporaryDirectory(prefix="megarlhf-logs-") as logs,
        running(),
        running_models(SumOfSources([source]), config.as_ppo(save=logs)),
    ):
        yield
