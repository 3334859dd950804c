"""All that can be known to be wrong with a configuration before PyTorch is imported, reported together.

A mistake is one sentence: `key=value rule with the other numbers (why): what to set`. Nothing here loads a model or
starts anything; models are judged by their config.json.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megarlhf.config.arguments import LoggingArguments, PPOConfig, PromptDataArguments, RewardArguments
from megarlhf.config.check_files import file_for_text_errors, place_errors, read_model, token_errors
from megarlhf.config.check_layout import broken, cluster_errors, layout_errors, role_errors, shared_errors, world_errors
from megarlhf.config.check_numbers import (
    Models,
    algorithm_errors,
    batch_errors,
    correction_errors,
    engine_errors,
    length_errors,
    limit_errors,
    sampling_errors,
    shared_prefix_errors,
)
from megarlhf.config.check_save import save_errors
from megarlhf.config.command_line import to_dict
from megarlhf.config.roles import megatron_roles
from megarlhf.config.supervised_arguments import ParityConfig, SFTConfig, SupervisedConfig, SupervisedDataArguments


class ConfigError(ValueError):
    """A configuration that cannot run; the message has one mistake a line."""


def raise_if(errors: Sequence[str]) -> None:
    """Raise ConfigError with all `errors`, one a line, if there are any."""
    if errors:
        raise ConfigError("\n".join(errors))


def check_ppo(config: PPOConfig) -> list[str]:
    """Every mistake found in a reinforcement-learning configuration, none where it may start."""
    batch, name = config.batch, "prompt_max_len + generate_max_len"
    models, errors = _models(config)
    errors += shared_errors(config.layout) + role_errors(config, models) + cluster_errors(config)
    errors += engine_errors(config.cluster.vllm_tensor_parallel_size, models["pretrain"])
    errors += batch_errors(batch, max(role.layout(config).context_parallel_size for role in megatron_roles(config)))
    errors += algorithm_errors(config.algorithm, batch, config.optimizer.freezing_actor_steps)
    errors += correction_errors(config)
    errors += length_errors(name, config.max_row_tokens, batch.max_tokens_per_micro_batch, models)
    errors += sampling_errors(config.rollout) + _template_errors(config.data) + _reward_errors(config.reward)
    return errors + _logging_errors(config.logging, evaluation="eval_data", path=config.data.eval_data)


def check_supervised(config: SupervisedConfig) -> list[str]:
    """Every mistake found in a supervised configuration, none where it may start."""
    batch, data, given = config.batch, config.data, config.ranks.num_gpus_per_node
    models, errors = _models(config)
    name = "num_gpus_per_node" if given == config.world_size else "torchrun's WORLD_SIZE"
    errors += shared_errors(config.layout) + layout_errors(config.layout, models)
    errors += world_errors(f"{name}={config.world_size}", config.world_size, config.layout, batch.global_batch_size)
    errors += length_errors("max_len", batch.max_len, batch.max_tokens_per_micro_batch, models)
    errors += _template_errors(data)
    if isinstance(config, SFTConfig):
        errors += _sft_errors(config)
    # One rank tries the run directory: another would find its traces there.
    tries_save = os.environ.get("RANK", "0") == "0"
    errors += _logging_errors(config.logging, evaluation="eval_dataset", path=data.eval_dataset, tries_save=tries_save)
    return errors


def _sft_errors(config: SFTConfig) -> list[str]:
    data = config.data
    return broken(
        {
            f"output_key=None means that input_key={data.input_key} holds whole conversations: set output_key, "
            "apply_chat_template, or pretrain_mode for plain text": (
                data.output_key is None and not data.apply_chat_template and not data.pretrain_mode
            )
        }
    )


def check_parity(config: ParityConfig) -> list[str]:
    """Every mistake found in a comparison of layouts, none where it may start."""
    model, parity, layout = config.model, config.parity, config.layout
    models, errors = _models(config)
    errors += shared_errors(layout) + layout_errors(layout, models)
    name = f"num_gpus_per_node={parity.num_gpus_per_node}"
    errors += world_errors(name, config.world_size, layout, 3 * parity.num_groups)
    if parity.share_prompt_prefix:
        errors += shared_prefix_errors(layout.context_parallel_size)
    return errors + broken(
        {
            f"tokenizer={model.tokenizer} is ignored (rows are random tokens): leave it out": model.tokenizer,
            f"moe_aux_loss_coeff={model.moe_aux_loss_coeff} cannot be compared (the load-balancing loss is a mean of "
            "micro-batches, which layouts cut otherwise): leave it out": model.moe_aux_loss_coeff,
        }
    )


def _models(config: PPOConfig | SupervisedConfig | ParityConfig) -> tuple[Models, list[str]]:
    """config.json of each model by the option that names it, and what is wrong with these, paths and single numbers."""
    model, options = config.model, to_dict(config)
    errors = place_errors(options) + limit_errors(options)
    starts = {"pretrain": model.pretrain}
    if isinstance(config, PPOConfig):
        starts |= dict(role.start(config) for role in megatron_roles(config))
    elif model.critic_pretrain is not None:
        errors.append(f"critic_pretrain={model.critic_pretrain} is ignored (only PPO has a critic): leave it out")
    models: dict[str, Mapping[str, Any]] = {}
    for key, path in starts.items():
        models[key], found = read_model(key, path)
        errors += found
        if key != "pretrain":
            errors += token_errors(key, path, model.tokenizer or model.pretrain, models[key], models["pretrain"])
    return models, errors


def _template_errors(data: PromptDataArguments | SupervisedDataArguments) -> list[str]:
    """What can be said of templates without the tokenizer."""
    template, chat = data.input_template, data.apply_chat_template
    try:
        is_placed = template is None or "probe" in template.format("probe")
    except (KeyError, IndexError, ValueError, AttributeError):
        is_placed = False
    errors = broken(
        {
            "tokenizer_chat_template is ignored without apply_chat_template: set that, or leave it out": (
                data.tokenizer_chat_template is not None and not chat
            ),
            f"input_template={template!r} with apply_chat_template=True (one renders a prompt): leave one out": (
                template is not None and chat
            ),
            f"input_template={template!r} must hold one {{}} for the prompt, and other braces doubled": not is_placed,
        }
    )
    return errors + file_for_text_errors("input_template", template)


def _reward_errors(reward: RewardArguments) -> list[str]:
    function, rule, pattern = reward.reward_function, reward.reward_rule, reward.reward_format
    errors = broken(
        {
            f"reward_function={function} and reward_rule={rule} (exactly one of them scores): set reward_function to a "
            "Python file, or reward_rule to math, exact_match or format": (function is None) == (rule is None),
            "reward_format=None with reward_rule=format (it is the pattern to match): set reward_format": (
                rule == "format" and pattern is None
            ),
            f"reward_format={pattern!r} is ignored with reward_rule={rule}: set reward_rule=format": (
                rule != "format" and pattern is not None
            ),
        }
        | {
            f"reward_env={name} is not a variable of this environment (reward code is to see it): set it, and give its "
            "name": name not in os.environ
            for name in reward.reward_env
        }
    )
    errors += file_for_text_errors("reward_format", pattern)
    try:
        re.compile(pattern or "")
    except re.error as error:
        errors.append(f"reward_format={pattern!r} is not a regular expression ({error}): correct it")
    return errors


def _logging_errors(
    logging: LoggingArguments, *, evaluation: str, path: str | None, tries_save: bool = True
) -> list[str]:
    """`evaluation` is the option that holds `path`, the evaluation data."""
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline"
    return (save_errors(logging.save, logging.load) if tries_save else []) + broken(
        {
            "no_load_optim=True has nothing to load without load: set load, or leave it out": (
                logging.no_load_optim and logging.load is None
            ),
            f"eval_interval={logging.eval_interval} has nothing to evaluate on: set {evaluation}": (
                logging.eval_interval is not None and path is None
            ),
            "use_wandb=True finds no key: set the environment variable WANDB_API_KEY, or WANDB_MODE=offline": (
                logging.use_wandb and not has_key
            ),
        }
    )
