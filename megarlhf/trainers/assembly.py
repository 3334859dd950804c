"""From the configuration to a role's engine and objective, inside its worker process."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megarlhf.config.arguments import PPOConfig, RolloutArguments, SharedOptimizerArguments
from megarlhf.config.check_rewards import moments
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.precision import PrecisionArguments, RLPrecisionArguments
from megarlhf.config.roles import LISTS, RoleSpec
from megarlhf.config.supervised_arguments import ParityConfig, SupervisedConfig
from megarlhf.data.planning import PackingOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.engine.average import WeightAverage
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective
from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.formats.huggingface import read_config
from megarlhf.models.build import ModelOptions
from megarlhf.parallel.groups import ParallelSizes
from megarlhf.parallel.truncation import Truncation
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.pretraining import PretrainingLoss, pretraining_directory
from megarlhf.trainers.value import value_objective


def build_engine(config: PPOConfig, role: RoleSpec) -> MegatronEngine:
    """A role's engine in a process whose groups are set up. Adapters and FP8 are of what trains."""
    layout, optimizer, own = role.layout(config), None, config
    if not role.trains:
        own = replace(config, lora=LoraArguments(), precision=RLPrecisionArguments())
    if role.learning_rate is not None:
        rate, steps = getattr(config.optimizer, role.learning_rate), optimizer_steps(config, role)
        optimizer = optimizer_options(config.optimizer, layout, rate, steps, passed=config.passed.megatron)
    model = model_options(layout, own)
    option, directory = role.start(config)
    if role.trains and option.startswith(LISTS) and config.algorithm.normalize_reward:
        # A critic that starts from a reward model speaks of its rewards as they are normalised.
        found = moments(vars(read_config(directory, option=option)))
        assert found is not None, "config/check_rewards.py asks for them"
        model = replace(model, value_moments=found)
    return MegatronEngine(
        directory,
        head=role.head,
        model=model,
        packing=PackingOptions(
            max_tokens=config.micro_batch_tokens,
            share_prefix=bool(config.batch.share_prompt_prefix) and layout.context_parallel_size == 1,
        ),
        optimizer=optimizer,
        logprob_chunk_tokens=config.batch.logprob_chunk_tokens,
        temperature=config.rollout.temperature,
        truncation=truncation(config.rollout),
        seed=config.model.seed,
    )


def truncation(rollout: RolloutArguments) -> Truncation:
    """What of the policy's distribution responses are sampled from."""
    top_k = rollout.top_k if rollout.top_k > 0 else None
    return Truncation(top_p=rollout.top_p, top_k=top_k, min_p=rollout.min_p)


def optimizer_steps(config: PPOConfig, role: RoleSpec) -> int:
    """Optimizer steps of the whole run, for the role's learning-rate schedule; frozen steps make none."""
    frozen = 0 if role.freezing_steps is None else max(0, getattr(config.optimizer, role.freezing_steps))
    return (config.batch.total_steps - frozen) * config.batch.updates_per_step


def build_objective(config: PPOConfig, role: RoleSpec) -> Objective:
    """The loss of a role that trains, by its head."""
    algorithm = config.algorithm
    if role.head == "value":
        return value_objective(value_clip=algorithm.value_clip)
    return policy_objective(
        PolicyLossOptions(
            clip_eps_low=algorithm.eps_clip,
            clip_eps_high=algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high,
            dual_clip=algorithm.dual_clip,
            entropy_coef=algorithm.entropy_coef,
            kl_loss_coef=algorithm.init_kl_coef if algorithm.use_kl_loss else 0.0,
            kl_estimator=algorithm.kl_estimator,
            tis_cap=algorithm.tis_cap if config.uses_tis else None,
            tis_mask_range=algorithm.tis_mask_range if config.uses_tis else None,
        )
    )


def build_average(config: PPOConfig, role: RoleSpec, engine: MegatronEngine) -> WeightAverage | None:
    """The average of the policy's weights, from those that it has now; None where none is kept."""
    averages = config.optimizer.enable_ema and role.head == "lm"
    return WeightAverage(engine, config.optimizer.ema_decay) if averages else None


def build_pretraining(config: PPOConfig, role: RoleSpec, engine: MegatronEngine) -> PretrainingLoss | None:
    """The pretraining loss of the policy, whose data is there already; None where there is none."""
    if config.pretraining.pretrain_data is None or role.head != "lm":
        return None
    return PretrainingLoss(
        engine,
        SupervisedData.open(pretraining_directory(config)),
        coef=config.pretraining.ptx_coef,
        batch_size=config.batch.global_batch_size,
        seed=config.model.seed,
    )


def chat_template(config: PPOConfig | SupervisedConfig) -> str | None:
    """The text that replaces the tokenizer's chat template; None where its own is used."""
    given = config.data.tokenizer_chat_template
    if given is None:
        return None
    return str(load_tokenizer(config.model.tokenizer or config.model.pretrain, chat_template=given).chat_template)


def parallel_sizes(layout: LayoutArguments) -> ParallelSizes:
    """The process groups' part of the layout flags."""
    return ParallelSizes(
        tensor=layout.tensor_model_parallel_size,
        pipeline=layout.pipeline_model_parallel_size,
        context=layout.context_parallel_size,
        expert=layout.expert_model_parallel_size,
        expert_tensor=layout.expert_tensor_parallel_size,
        virtual=layout.virtual_stages,
    )


def model_options(layout: LayoutArguments, config: PPOConfig | SupervisedConfig | ParityConfig) -> ModelOptions:
    """The model's part of the flags."""
    return ModelOptions(
        bf16=config.model.bf16,
        layout=layout,
        moe_aux_loss_coeff=config.model.moe_aux_loss_coeff,
        kernels=config.kernels,
        passed=config.passed.megatron,
        lora=LoraArguments() if isinstance(config, ParityConfig) else config.lora,
        precision=PrecisionArguments() if isinstance(config, ParityConfig) else config.precision,
    )


def optimizer_options(
    optimizer: SharedOptimizerArguments,
    layout: LayoutArguments,
    learning_rate: float,
    total_steps: int,
    *,
    passed: Mapping[str, Any],
) -> OptimizerOptions:
    """The optimizer flags, for one role's learning rate and number of optimizer steps."""
    own = {"learning_rate": learning_rate, "total_steps": total_steps, "passed": passed}
    return OptimizerOptions(**(_named_alike(OptimizerOptions, optimizer, layout) | own))


def _named_alike(options: type, *groups: Any) -> dict[str, Any]:
    """Fields of `options` that one of the groups of flags has under the same name."""
    names = {field.name for field in fields(options)}
    return {name: value for group in groups for name, value in vars(group).items() if name in names}
