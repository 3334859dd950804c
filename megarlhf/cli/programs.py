"""The programs whose configuration is checked before PyTorch is imported, and how they start."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

from megarlhf.cli.errors import report_errors
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.check_loops import check_eval, check_generate, check_iterate, check_score, check_select
from megarlhf.config.checks import check_chat, check_parity, check_ppo, check_supervised, raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.eval_config import EvalConfig
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig, IterateConfig, ScoreConfig, SelectConfig
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, ParityConfig, SFTConfig, SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class Program:
    """`megarlhf NAME`, whose `run` is that of a module of this folder: run_NAME where none is given."""

    name: str
    config: type[Any]
    check: Callable[[Any], list[str]]
    module: str = ""
    resolve: Callable[[Any], Any] = lambda config: config  # what is decided before the checks
    starts_ranks: bool = False  # its ranks are started with the arguments, which `run` takes too

    def __call__(self, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        """Parse, check and run; returns the exit status."""
        arguments, prog = list(sys.argv[1:] if argv is None else argv), prog or f"megarlhf {self.name}"
        config, dry_run = parse(self.config, arguments, prog=prog)
        return report_errors(prog, lambda: self.start(config, arguments, dry_run=dry_run))

    def start(self, config: Any, arguments: Sequence[str] = (), *, dry_run: bool = False) -> int:
        """Run a configuration, or raise ConfigError with all that is wrong with it."""
        config = self.resolve(config)
        raise_if(self.check(config))
        run = import_module(f"megarlhf.cli.{self.module or f'run_{self.name}'}").run
        return int(run(config, list(arguments), dry_run=dry_run) if self.starts_ranks else run(config, dry_run=dry_run))


def _ppo(config: PPOConfig, *, ray: bool) -> PPOConfig:
    """`ray` is whether workers run in Ray, where the arguments do not say it."""
    cluster = replace(config.cluster, ray=ray if config.cluster.ray is None else config.cluster.ray)
    return replace(config, cluster=cluster, logging=config.logging.continued(), reward=config.reward.resolved())


def _supervised(config_class: type[SupervisedConfig]) -> Program:
    return Program(
        name=config_class.program,
        config=config_class,
        check=check_supervised,
        module="run_supervised",
        resolve=lambda config: replace(config, logging=config.logging.continued()),
        starts_ranks=True,
    )


PPO = Program(name="ppo", config=PPOConfig, check=check_ppo, resolve=partial(_ppo, ray=False))
PPO_IN_RAY = replace(PPO, resolve=partial(_ppo, ray=True))
SFT, RM, PRM, DPO, KTO, KD = map(_supervised, (SFTConfig, RMConfig, PRMConfig, DPOConfig, KTOConfig, KDConfig))
GENERATE = Program(name="generate", config=GenerateConfig, check=check_generate)
SCORE = Program(name="score", config=ScoreConfig, check=check_score)
SELECT = Program(name="select", config=SelectConfig, check=check_select)
ITERATE = Program(name="iterate", config=IterateConfig, check=check_iterate)
EVAL = Program(name="eval", config=EvalConfig, check=check_eval)
CHAT = Program(name="chat", config=ChatConfig, check=check_chat, module="chat")
PARITY = Program(name="parity", config=ParityConfig, check=check_parity, starts_ranks=True)
REHEARSE = replace(PPO_IN_RAY, name="rehearse")
