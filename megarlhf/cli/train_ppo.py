"""RL from a reward on this machine, without Ray: `python -m megarlhf.cli.train_ppo` or `megarlhf ppo --no_ray`."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from megarlhf.cli.errors import report_errors
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo, raise_if
from megarlhf.config.command_line import parse


def main(argv: Sequence[str] | None = None, *, ray: bool = False) -> int:
    """Parse, check, plan and run; returns the exit status.

    Args:
        ray: whether workers run in Ray, where the arguments do not say it.
    """
    config, dry_run = parse(PPOConfig, list(sys.argv[1:] if argv is None else argv), prog="megarlhf ppo")
    if config.cluster.ray is None:
        config = replace(config, cluster=replace(config.cluster, ray=ray))
    return report_errors("megarlhf ppo", lambda: _run(config, dry_run=dry_run))


def _run(config: PPOConfig, *, dry_run: bool) -> int:
    config = replace(config, logging=config.logging.continued(), reward=config.reward.resolved())
    raise_if(check_ppo(config))
    from megarlhf.cli.run_ppo import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
