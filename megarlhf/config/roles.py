"""The roles of a reinforcement-learning run: one row each, read by all that places, starts, wakes, checks or saves one.

A new role is a row of ROLES and the methods of its worker. Options are named here and stand in arguments.py and
layouts.py; of several names the first whose option is given counts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.layouts import LayoutArguments

Part = Literal["parameters", "gradients", "optimizer", "reference"]
PARTS: tuple[Part, ...] = ("parameters", "gradients", "optimizer", "reference")

EnginePart = Literal["weights", "kv_cache"]  # of an inference engine, by vLLM's names
ENGINE_PARTS: tuple[EnginePart, ...] = ("weights", "kv_cache")

Phase = Literal["rollout", "reward", "judge", "train", "sync", "checkpoint", "export"]  # judge: of an evaluation
# A sync comes before engines that slept for it answer again.
REPLACES_WEIGHTS: tuple[Phase, ...] = ("reward", "train", "sync")


LISTS = ("reward_pretrain",)  # options that name several directories, with commas between them


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """What tells one role from another."""

    name: str
    runs: Literal["megatron", "vllm"]  # what its processes are: ranks of one model, or engines side by side
    checkpoint: tuple[str, ...]  # options of the directory that it starts from; without any it is in no run
    head: Literal["lm", "value"]  # vocabulary logits, or one value a token
    prefix: str = ""  # of the options of its layout; "": it has the actor's
    learning_rate: str | None = None  # option; None: it is frozen
    freezing_steps: str | None = None  # option: RL steps at the start that do not train it
    has_reference: bool = False  # its start stays beside it, where the KL to it counts
    workers: tuple[tuple[str, ...], ...]  # options whose product is the number of its processes
    devices: str | None = None  # option: devices of one process; None: it has one
    estimators: tuple[str, ...] | None = None  # advantage_estimator that needs it; None: every one
    number: int = 0  # which of the directories of LISTS, and of values of its layout that are one for each of them
    awake: Mapping[Phase, tuple[Any, ...]]  # parts that are on the device in a phase; gradients and the reference are
    # left out: their engine brings them, inside an update and while the reference computes

    @property
    def trains(self) -> bool:
        """Whether its weights change, and are saved."""
        return self.learning_rate is not None

    @property
    def parts(self) -> tuple[Any, ...]:
        """All that is awake in some phase."""
        return tuple(dict.fromkeys(part for parts in self.awake.values() for part in parts))

    def is_in(self, config: PPOConfig) -> bool:
        """Whether a run has it."""
        is_named = any(getattr(config.model, option) is not None for option in self.checkpoint)
        return is_named and (self.estimators is None or config.algorithm.advantage_estimator in self.estimators)

    def models(self, config: PPOConfig) -> Iterator["RoleSpec"]:
        """The row, or where its option lists several directories one for each, numbered from 0."""
        option, value = first_given(config.model, self.checkpoint)
        count = len(value.split(",")) if option in LISTS and option == self.checkpoint[0] else 1
        yield from ([self] if count == 1 else (replace(self, name=f"{self.name}_{n}", number=n) for n in range(count)))

    def start(self, config: PPOConfig) -> tuple[str, str]:
        """The option that names its checkpoint, with the place of one of several, and the directory."""
        option, value = first_given(config.model, self.checkpoint)
        if option not in LISTS or "," not in value:
            return option, value
        return f"{option}[{self.number}]", value.split(",")[self.number].strip()

    def num_workers(self, config: PPOConfig) -> int:
        """Processes."""
        return math.prod(first_given(config.cluster, names)[1] for names in self.workers)

    def nodes(self, config: PPOConfig) -> tuple[int, int]:
        """Of a model: its nodes, and its processes on each."""
        num_nodes, each = (first_given(config.cluster, names)[1] for names in self.workers)
        return num_nodes, each

    def devices_per_worker(self, config: PPOConfig) -> int:
        """Devices of each process."""
        return 1 if self.devices is None else int(getattr(config.cluster, self.devices))

    def keeps_reference(self, config: PPOConfig) -> bool:
        """Whether its start is looked at; with adapters that takes no memory."""
        return self.has_reference and config.algorithm.init_kl_coef > 0

    def own_layout(self, config: PPOConfig) -> dict[str, Any]:
        """What is given of its layout, by the names of LayoutArguments."""
        given = vars(getattr(config, f"{self.prefix}layout")) if self.prefix else {}
        own = {name.removeprefix(self.prefix): value for name, value in given.items() if value not in (None, ())}
        # A wrong number of values is told by the checks.
        return {n: v[min(self.number, len(v) - 1)] if isinstance(v, tuple) else v for n, v in own.items()}

    def own_options(self, config: PPOConfig) -> dict[str, Any]:
        """What is given of the options that no other role reads."""
        groups = [(config.model, self.checkpoint), *((config.cluster, names) for names in self.workers)]
        own = {names[0]: getattr(group, names[0]) for group, names in groups if len(names) > 1}
        own |= {f"{self.prefix}{name}": value for name, value in self.own_layout(config).items()}
        return {option: value for option, value in own.items() if value is not None}

    def layout(self, config: PPOConfig) -> LayoutArguments:
        """The actor's layout, with what the role has of its own and what that rules out of the actor's."""
        own = self.own_layout(config)
        if "pipeline_model_parallel_size" in own:
            stages = ("num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers")
            own = dict.fromkeys((*stages, "decoder_last_pipeline_num_layers")) | own
        if own.get("tensor_model_parallel_size") == 1:
            own = {"sequence_parallel": False} | own
        if not own.keys().isdisjoint({"tensor_model_parallel_size", "expert_model_parallel_size"}):
            own = {"expert_tensor_parallel_size": None} | own
        return replace(config.layout, **own)


ROLES: dict[str, RoleSpec] = {
    role.name: role
    for role in (
        RoleSpec(
            name="actor",
            runs="megatron",
            checkpoint=("pretrain",),
            head="lm",
            learning_rate="actor_learning_rate",
            freezing_steps="freezing_actor_steps",
            has_reference=True,
            workers=(("actor_num_nodes",), ("actor_num_gpus_per_node",)),
            awake={
                "train": ("parameters", "optimizer"),
                "sync": ("parameters",),
                "checkpoint": ("parameters", "optimizer"),
                "export": ("parameters",),
            },
        ),
        RoleSpec(
            name="critic",
            runs="megatron",
            checkpoint=("critic_pretrain", "reward_pretrain", "pretrain"),
            head="value",
            prefix="critic_",
            learning_rate="critic_learning_rate",
            workers=(
                ("critic_num_nodes", "actor_num_nodes"),
                ("critic_num_gpus_per_node", "actor_num_gpus_per_node"),
            ),
            estimators=("gae",),
            awake={
                "train": ("parameters", "optimizer"),
                "checkpoint": ("parameters", "optimizer"),
                "export": ("parameters",),
            },
        ),
        RoleSpec(
            name="reward",
            runs="megatron",
            checkpoint=("reward_pretrain",),
            head="value",
            prefix="reward_",
            workers=(
                ("reward_num_nodes", "actor_num_nodes"),
                ("reward_num_gpus_per_node", "actor_num_gpus_per_node"),
            ),
            awake={"reward": ("parameters",), "judge": ("parameters",)},
        ),
        RoleSpec(
            name="rollout",
            runs="vllm",
            checkpoint=("pretrain",),
            head="lm",
            workers=(("vllm_num_engines",),),
            devices="vllm_tensor_parallel_size",
            awake={"rollout": ("weights", "kv_cache"), "sync": ("weights",)},
        ),
    )
}


def row_of(name: str) -> RoleSpec:
    """The row of a role by its name, that of one of several models too."""
    base, _, number = name.rpartition("_")
    return ROLES[base if number.isdecimal() else name]


def first_given(options: Any, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of these options that is not None, and its value."""
    return next((name, value) for name in names if (value := getattr(options, name)) is not None)


def megatron_roles(config: PPOConfig) -> list[RoleSpec]:
    """The roles of a run that are models of Megatron's, in the order of the table."""
    rows = [role for role in ROLES.values() if role.is_in(config) and role.runs == "megatron"]
    stays: dict[Phase, tuple[Any, ...]] = dict.fromkeys(get_args(Phase), ("parameters",))
    models = [model for role in rows for model in role.models(config)]
    return [role if role.trains or not config.keeps_resident else replace(role, awake=stays) for role in models]


def reward_roles(config: PPOConfig) -> list[RoleSpec]:
    """The roles of a run's reward models, in the order of reward_pretrain."""
    return list(ROLES["reward"].models(config)) if ROLES["reward"].is_in(config) else []


def roles_of(config: PPOConfig) -> list[RoleSpec]:
    """Every role of a run, the inference engines last."""
    return megatron_roles(config) + [role for role in ROLES.values() if role.is_in(config) and role.runs == "vllm"]


def unread_counts(config: PPOConfig) -> dict[str, int]:
    """Numbers of ranks that are given for roles which the run has not; OpenRLHF's lines give them in any case."""
    absent = [role for role in ROLES.values() if not role.is_in(config)]
    given = {names[0]: getattr(config.cluster, names[0]) for role in absent for names in role.workers}
    return {option: number for option, number in given.items() if number is not None}


def layout_lines(config: PPOConfig) -> list[str]:
    """For each role that may have a layout of its own: what it has of it, and what of the actor's."""
    lines = []
    for role in megatron_roles(config):
        layout, own, said = vars(role.layout(config)), role.own_layout(config), []
        for option in vars(getattr(config, f"{role.prefix}layout")) if role.prefix else ():
            name = option.removeprefix(role.prefix)
            value, actors = layout[name], getattr(config.layout, name)
            if value is None and actors is None:
                continue
            source = option if name in own else "the actor's" if value == actors else f"not the actor's {actors}"
            said.append(f"{name}={value} ({source})")
        if said:
            lines.append(f"{role.name}: {', '.join(said)}")
    return lines
