"""Reward models that are started without the rest of an RL run, as score, iterate, serve-rm and eval do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from megarlhf.cli.errors import all_or_errors
from megarlhf.cli.memory import MemoryPlan, fitting_memory
from megarlhf.cli.run import check_weights, resolve_kernels
from megarlhf.cli.run_ppo import find_machine
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.roles import ROLES, reward_roles
from megarlhf.models.backend import resolve_transformer_impl
from megarlhf.planner.placement import PlacementPlan, plan_placement
from megarlhf.reward.model import RewardModel, ScoringModel
from megarlhf.reward.sources import RewardSource


class OpenedModels(NamedTuple):
    """Reward models, and maybe engines, whose files are read and which have devices and room."""

    config: PPOConfig
    plan: PlacementPlan
    memory: MemoryPlan

    def text(self) -> str:
        """Which process runs where, and what it takes there."""
        return f"{self.plan.table()}\n\n{self.memory.text()}"


def opened_models(config: PPOConfig, *, engines: bool = False) -> OpenedModels:
    """Read and plan the reward models of an RL run, and with `engines` its inference engines, but nothing else of it.

    Raises:
        ConfigError: whatever is wrong with kernels, weights, devices and memory.
    """
    rewards, machine = reward_roles(config), find_machine(config)
    roles = [*rewards, *([ROLES["rollout"]] if engines else [])]
    layouts = [(role.prefix, role.layout(config)) for role in rewards]
    policy = ("pretrain", config.model.pretrain, LayoutArguments(), "lm")
    starts = [(*role.start(config), role.layout(config), role.head) for role in rewards]
    asked = config.kernels.transformer_impl if rewards else "local"

    def memory() -> tuple[MemoryPlan, bool]:
        impl = resolve_transformer_impl(asked, device=machine.kind)
        steps = [partial(check_weights, starts, transformer_impl=impl)]
        steps += [partial(check_weights, [policy], transformer_impl="local", generates=True)] if engines else []
        found, *policies = all_or_errors(steps)
        models = [model.config for part in (*policies, found) for model in part]
        return fitting_memory(config, models, only=roles), impl == "local"

    kernels = partial(resolve_kernels, config, layouts, share_prompt_prefix=False, device=machine.kind)
    places = partial(plan_placement, config, machine, only=roles)
    (room, shares), plan, *_ = all_or_errors([memory, places, *([kernels] if rewards else [])])
    return OpenedModels(replace(config, batch=replace(config.batch, share_prompt_prefix=shares)), plan, room)


def give_models(sources: Sequence[RewardSource], models: Mapping[str, ScoringModel]) -> None:
    """Tell the reward models among the sources what computes their scores, by the names of their roles."""
    for source in sources:
        if isinstance(source, RewardModel):
            source.model = models[source.role]


@contextmanager
def running_models(models: OpenedModels | None, sources: Sequence[RewardSource]) -> Iterator[None]:
    """The processes of the reward models among these sources, which end with the block."""
    if models is None:
        yield
        return
    from megarlhf.cluster import launch  # seconds, for those who have reward models

    config, plan, _ = models
    with launch.open_groups(config, plan, reward_roles(config)) as groups:
        give_models(sources, launch.reward_models(config, groups))
        for group in groups.values():
            group.call("wake", ("parameters",))
        yield
