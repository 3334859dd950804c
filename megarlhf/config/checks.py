"""All that can be known to be wrong with a configuration before any process starts, reported together.

A mistake is one sentence: `key=value rule with the other numbers (why): what to set`. Nothing here loads a model or
starts anything; models are judged by their config.json.
"""

import os
import re
from collections.abc import Sequence

from megarlhf.config.arguments import (
    LoggingArguments,
    ModelArguments,
    PPOConfig,
    PromptDataArguments,
    RewardArguments,
)
from megarlhf.config.check_files import (
    data_errors,
    file_for_text_errors,
    load_errors,
    read_model,
    reward_function_errors,
    same_vocabulary_errors,
    smaller_vocabulary_errors,
    tokenizer_errors,
)
from megarlhf.config.check_layout import (
    cluster_errors,
    layout_errors,
    role_errors,
    shared_errors,
    world_errors,
)
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
from megarlhf.config.roles import megatron_roles
from megarlhf.config.supervised_arguments import ParityConfig, SFTConfig, SFTDataArguments

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)
_ODD_REWARD_CLASSES = ("Gemma3TextForSequenceClassification",)  # named otherwise than after the causal model


class ConfigError(ValueError):
    """A configuration that cannot run; the message has one mistake a line."""


def raise_if(errors: Sequence[str]) -> None:
    """Raise ConfigError with all `errors`, one a line, if there are any."""
    if errors:
        raise ConfigError("\n".join(errors))


def check_ppo(config: PPOConfig, supported_architectures: Sequence[str] = SUPPORTED_ARCHITECTURES) -> list[str]:
    """Every mistake found in a reinforcement-learning configuration, none where it may start.

    Args:
        supported_architectures: class names of the causal language models that can be trained.
    """
    batch, rollout = config.batch, config.rollout
    models, errors = _models(config, supported_architectures)
    length = rollout.prompt_max_len + rollout.generate_max_len
    errors += limit_errors(config)
    errors += shared_errors(config.layout)
    errors += role_errors(config, models)
    errors += cluster_errors(config)
    errors += engine_errors(config.cluster.vllm_tensor_parallel_size, models["pretrain"])
    errors += batch_errors(batch, max(role.layout(config).context_parallel_size for role in megatron_roles(config)))
    errors += algorithm_errors(config.algorithm, batch, config.optimizer.freezing_actor_steps)
    errors += correction_errors(config)
    errors += length_errors("prompt_max_len + generate_max_len", length, batch.max_tokens_per_micro_batch, models)
    errors += sampling_errors(rollout)
    errors += _template_errors(config.data, config.model)
    errors += _prompt_errors(config.data, config.reward)
    errors += _reward_errors(config.reward)
    errors += _logging_errors(config.logging, evaluation="eval_data", path=config.data.eval_data)
    return errors


def check_sft(config: SFTConfig, supported_architectures: Sequence[str] = SUPPORTED_ARCHITECTURES) -> list[str]:
    """Every mistake found in a supervised configuration, none where it may start.

    Args:
        supported_architectures: class names of the causal language models that can be trained.
    """
    batch = config.batch
    models, errors = _only_model(config.model, supported_architectures)
    name, world_size = f"num_gpus_per_node={config.sft_cluster.num_gpus_per_node}", config.sft_cluster.num_gpus_per_node
    if os.environ.get("WORLD_SIZE", "").isdecimal():  # torchrun started the ranks
        name, world_size = f"torchrun's WORLD_SIZE={os.environ['WORLD_SIZE']}", int(os.environ["WORLD_SIZE"])
    errors += limit_errors(config)
    errors += shared_errors(config.layout) + layout_errors(config.layout, models)
    errors += world_errors(name, world_size, config.layout, batch.global_batch_size)
    errors += length_errors("max_len", batch.max_len, batch.max_tokens_per_micro_batch, models)
    errors += _template_errors(config.data, config.model)
    errors += _supervised_data_errors(config.data)
    # One rank tries the run directory: another would find its traces there.
    tries_save = os.environ.get("RANK", "0") == "0"
    path = config.data.eval_dataset
    errors += _logging_errors(config.logging, evaluation="eval_dataset", path=path, tries_save=tries_save)
    return errors


def check_parity(config: ParityConfig, supported_architectures: Sequence[str] = SUPPORTED_ARCHITECTURES) -> list[str]:
    """Every mistake found in a comparison of layouts, none where it may start."""
    parity, layout = config.parity, config.layout
    models, errors = _only_model(config.model, supported_architectures)
    errors += limit_errors(config)
    errors += shared_errors(layout) + layout_errors(layout, models)
    name = f"num_gpus_per_node={parity.num_gpus_per_node}"
    errors += world_errors(name, config.world_size, layout, 3 * parity.num_groups)
    if config.model.tokenizer is not None:
        errors.append(f"tokenizer={config.model.tokenizer} is ignored (rows are random tokens): leave it out")
    if parity.share_prompt_prefix:
        errors += shared_prefix_errors(layout.context_parallel_size)
    if config.model.moe_aux_loss_coeff:
        errors.append(
            f"moe_aux_loss_coeff={config.model.moe_aux_loss_coeff} cannot be compared (the load-balancing loss is a "
            "mean of micro-batches, which layouts cut otherwise): leave it out"
        )
    return errors


def _models(config: PPOConfig, architectures: Sequence[str]) -> tuple[Models, list[str]]:
    """config.json of each role's model by the option that names it, and what keeps them from being loaded."""
    model = config.model
    actor, errors = read_model("pretrain", model.pretrain, architectures)
    models = {"pretrain": actor}
    with_head = [name.replace("ForCausalLM", "ForSequenceClassification") for name in architectures]
    with_head += _ODD_REWARD_CLASSES
    for role in megatron_roles(config):
        option, path = role.start(config)
        if option not in models:
            heads = with_head if role.head == "value" else []
            models[option], found = read_model(option, path, [*architectures, *heads])
            errors += found + same_vocabulary_errors(option, path, model.tokenizer or model.pretrain)
            errors += smaller_vocabulary_errors(f"{option}={path}", models[option], actor)
    return models, errors


def _only_model(model: ModelArguments, architectures: Sequence[str]) -> tuple[Models, list[str]]:
    """The same of a program that trains no critic."""
    found, errors = read_model("pretrain", model.pretrain, architectures)
    if model.critic_pretrain is not None:
        errors.append(f"critic_pretrain={model.critic_pretrain} is ignored (only PPO has a critic): leave it out")
    return {"pretrain": found}, errors


def _template_errors(data: PromptDataArguments | SFTDataArguments, model: ModelArguments) -> list[str]:
    key, path = ("pretrain", model.pretrain) if model.tokenizer is None else ("tokenizer", model.tokenizer)
    chat, template = data.apply_chat_template, data.input_template
    errors: list[str] = []
    if key == "tokenizer" or os.path.isdir(path):  # a missing pretrain is reported with the models
        errors += tokenizer_errors(key, path, apply_chat_template=chat, chat_template=data.tokenizer_chat_template)
    if data.tokenizer_chat_template is not None and not chat:
        errors.append("tokenizer_chat_template is ignored without apply_chat_template: set that, or leave it out")
    if template is None:
        return errors
    if chat:
        errors.append(
            f"input_template={template!r} with apply_chat_template=True (one renders a prompt): leave one out"
        )
    try:
        is_placed = "probe" in template.format("probe")
    except (KeyError, IndexError, ValueError, AttributeError):
        is_placed = False
    if not is_placed:
        errors.append(f"input_template={template!r} must hold one {{}} for the prompt, and other braces doubled")
    return errors + file_for_text_errors("input_template", template)


def _prompt_errors(data: PromptDataArguments, reward: RewardArguments) -> list[str]:
    columns = {"input_key": data.input_key}
    # A label is optional under its default name; a rule that compares, or a name that the user chose, asks for it.
    if reward.reward_rule in ("math", "exact_match") or data.label_key != PromptDataArguments.label_key:
        columns["label_key"] = data.label_key
    errors = data_errors("prompt_data", data.prompt_data, columns)
    return errors + (data_errors("eval_data", data.eval_data, columns) if data.eval_data is not None else [])


def _supervised_data_errors(data: SFTDataArguments) -> list[str]:
    columns = {"input_key": data.input_key} | ({} if data.output_key is None else {"output_key": data.output_key})
    errors = data_errors("dataset", data.dataset, columns)
    if data.eval_dataset is not None:
        errors += data_errors("eval_dataset", data.eval_dataset, columns)
    if data.output_key is None and not data.apply_chat_template and not data.pretrain_mode:
        errors.append(
            f"output_key=None means that input_key={data.input_key} holds whole conversations: set output_key, "
            "apply_chat_template, or pretrain_mode for plain text"
        )
    return errors


def _reward_errors(reward: RewardArguments) -> list[str]:
    function, rule, pattern = reward.reward_function, reward.reward_rule, reward.reward_format
    errors = [] if function is None else reward_function_errors(function)
    if (function is None) == (rule is None):
        errors.append(
            f"reward_function={function} and reward_rule={rule} (exactly one of them scores): set reward_function to a "
            "Python file, or reward_rule to math, exact_match or format"
        )
    if rule == "format" and pattern is None:
        errors.append("reward_format=None with reward_rule=format (it is the pattern to match): set reward_format")
    if rule != "format" and pattern is not None:
        errors.append(f"reward_format={pattern!r} is ignored with reward_rule={rule}: set reward_rule=format")
    errors += [
        f"reward_env={name} is not a variable of this environment (reward code is to see it): set it, and give its name"
        for name in reward.reward_env
        if name not in os.environ
    ]
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
    errors = save_errors(logging.save, logging.load) if tries_save else []
    if logging.load is not None:
        errors += load_errors(logging.load)
    elif logging.no_load_optim:
        errors.append("no_load_optim=True has nothing to load without load: set load, or leave it out")
    if logging.eval_interval is not None and path is None:
        errors.append(f"eval_interval={logging.eval_interval} has nothing to evaluate on: set {evaluation}")
    if logging.use_wandb and not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "offline":
        errors.append("use_wandb=True finds no key: set the environment variable WANDB_API_KEY, or WANDB_MODE=offline")
    return errors
