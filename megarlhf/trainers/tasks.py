"""From the configuration of a supervised program to what it trains, inside a rank."""

from megarlhf.config.supervised_arguments import SFTConfig, SupervisedConfig
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.sft import sft_task
from megarlhf.trainers.supervised import SupervisedTask


def build_task(config: SupervisedConfig, engine: MegatronEngine) -> SupervisedTask:
    """The objective of the program, and what it needs of the engine before it trains."""
    match config:
        case SFTConfig():
            return sft_task()
    raise AssertionError(f"{type(config).__name__} has no task")
