"""All that can be known to be wrong with a configuration before PyTorch is imported, reported together.

A mistake is one sentence: `key=value rule with the other numbers (why): what to set`. Nothing here loads a model or
starts anything; models are judged by their config.json.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from megarlhf.config.arguments import LoggingArguments, PPOConfig, RenderingArguments
from megarlhf.config.chat_arguments import ChatConfig, ChatTextArguments
from megarlhf.config.check_files import file_for_text_errors, has_other_tokens, place_errors, read_model, token_errors
from megarlhf.config.check_layout import (
    broken,
    cluster_errors,
    layout_errors,
    offload_errors,
    resident_errors,
    role_errors,
    shared_errors,
    world_errors,
)
from megarlhf.config.check_numbers import (
    Models,
    adapter_errors,
    algorithm_errors,
    average_errors,
    batch_errors,
    correction_errors,
    engine_errors,
    filter_errors,
    length_errors,
    limit_errors,
    pretraining_errors,
    sampling_errors,
    shared_prefix_errors,
    value_network_errors,
)
from megarlhf.config.check_precision import precision_errors
from megarlhf.config.check_rewards import reward_errors, reward_model_errors
from megarlhf.config.check_save import ckpt_errors, save_errors
from megarlhf.config.command_line import to_dict
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.reward_model_arguments import RMConfig
from megarlhf.config.roles import LISTS, megatron_roles, reward_roles
from megarlhf.config.supervised_arguments import (
    DPOConfig,
    KTODataArguments,
    PairsConfig,
    ParityConfig,
    SFTDataArguments,
    SupervisedConfig,
    SupervisedDataArguments,
)
from megarlhf.formats.blends import blend_errors, parse_split
from megarlhf.formats.data_names import held_out_part, probability_errors

# What must be equal in the config.json of two checkpoints that one model computes with in turn.
_ARCHITECTURE = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rope_theta rope_scaling rope_parameters rms_norm_eps hidden_act sliding_window num_local_experts "
    "num_experts num_experts_per_tok moe_intermediate_size"
).split()


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
    trained = [role.layout(config) for role in megatron_roles(config) if role.trains]
    errors += batch_errors(batch, max(layout.context_parallel_size for layout in trained))
    errors += algorithm_errors(config.algorithm, batch, config.optimizer.freezing_actor_steps)
    errors += precision_errors(config, models) + correction_errors(config)
    errors += adapter_errors(config.lora) + pretraining_errors(config.pretraining)
    errors += offload_errors(config.optimizer, config.layout) + resident_errors(config)
    errors += average_errors(config.optimizer) + value_network_errors(config) + filter_errors(config)
    errors += length_errors(name, config.max_row_tokens, batch.max_tokens_per_micro_batch, models)
    errors += sampling_errors(config) + template_errors(config.data)
    errors += reward_errors(config.reward, num_models=len(reward_roles(config))) + reward_model_errors(config, models)
    errors += probability_errors(
        "prompt_data_probs", config.data.prompt_data_probs, "prompt_data", config.data.prompt_data
    )
    evaluates = config.evaluation.eval_data is not None
    errors += evaluation_errors(config.evaluation, is_read=config.reward.judges)
    return errors + _logging_errors(config.logging, evaluation="eval_data", evaluates=evaluates)


def evaluation_errors(evaluation: EvaluationArguments, *, is_read: bool) -> list[str]:
    """Options of an evaluation that are without effect; is_read: sampled responses count for something."""
    number, default = evaluation.eval_n_samples_per_prompt, EvaluationArguments()
    given = {name: value for name, value in vars(evaluation).items() if value != getattr(default, name)}
    unread = given if evaluation.eval_data is None else ()
    said = f"eval_temperature={evaluation.eval_temperature} is ignored with eval_n_samples_per_prompt={number} (greedy "
    said += "responses have none): set that, or leave it out"
    judged = f"eval_n_samples_per_prompt={number} is for eval/pass@K, which reward_rule or reward_function judges "
    judged += "(models and servers have scales of their own): set one of them, or leave it out"
    return [f"{name}={given[name]} has nothing to evaluate on: set eval_data" for name in unread] + broken(
        {
            said: evaluation.eval_temperature is not None and number == 0,
            judged: number > 0 and not is_read and evaluation.eval_data is not None,
        }
    )


def check_supervised(config: SupervisedConfig) -> list[str]:
    """Every mistake found in a supervised configuration, none where it may start."""
    batch, data, given = config.batch, config.data, config.ranks.num_gpus_per_node
    models, errors = _models(config)
    name = "num_gpus_per_node" if given == config.world_size else "torchrun's WORLD_SIZE"
    errors += shared_errors(config.layout) + layout_errors(config.layout, models)
    errors += world_errors(f"{name}={config.world_size}", config.world_size, config.layout, batch.global_batch_size)
    errors += length_errors("max_len", batch.max_len, batch.max_tokens_per_micro_batch, models)
    errors += template_errors(data) + _data_errors(data) + adapter_errors(config.lora)
    errors += average_errors(config.optimizer) + precision_errors(config, models)
    errors += offload_errors(config.optimizer, config.layout) + resident_errors(config)
    if isinstance(data, SFTDataArguments | KTODataArguments):
        errors += _answer_errors(data)
    if isinstance(config, PairsConfig):
        errors += _pairs_errors(config)
    if isinstance(config, DPOConfig):
        errors += _dpo_errors(config, models)
    if isinstance(config, RMConfig):
        errors += _rm_errors(config)
    if isinstance(config, KDConfig):
        errors += _kd_errors(config, models["pretrain"].get("vocab_size"))
    if isinstance(data, SFTDataArguments):
        errors += _indexed_errors(data)
    # One rank tries the run directory: another would find its traces there.
    tries_save = os.environ.get("RANK", "0") == "0"
    named = "split" if isinstance(data, SFTDataArguments) and data.data_path else "eval_dataset or eval_split"
    return errors + _logging_errors(config.logging, evaluation=named, evaluates=data.evaluates, tries_save=tries_save)


def _data_errors(data: SupervisedDataArguments) -> list[str]:
    part, split = held_out_part(data.eval_split), data.eval_split
    errors = probability_errors("dataset_probs", data.dataset_probs, "dataset", data.dataset)
    return errors + broken(
        {
            f"eval_split={split} must be above 0 and below 1 as a part of the data: use 0.03, or the name of a split": (
                part is not None and not 0 < part < 1
            ),
            f"eval_split={split} takes a part out of the training data, and eval_dataset={data.eval_dataset} is for "
            "evaluation already: leave one of them out": part is not None and data.eval_dataset is not None,
            f"eval_split={split} is train_split too (what is trained on proves nothing): set another, or 0.03 to take "
            "that part out of the training data": split == data.train_split and data.eval_dataset is None,
        }
    )


def _answer_errors(data: SFTDataArguments | KTODataArguments) -> list[str]:
    sft = isinstance(data, SFTDataArguments)
    plain, multiturn = (data.pretrain_mode, data.multiturn) if isinstance(data, SFTDataArguments) else (False, False)
    return broken(
        {
            f"output_key=None means that input_key={data.input_key} holds whole conversations: set output_key or "
            f"apply_chat_template{', or pretrain_mode for plain text' if sft else ''}": (
                data.output_key is None and not data.apply_chat_template and not plain
            ),
            "multiturn=True needs apply_chat_template (turns are those of a chat): set it, or leave multiturn out": (
                multiturn and not data.apply_chat_template
            ),
            "multiturn=True with pretrain_mode=True (one trains on the assistant's turns, the other on all): leave one "
            "out": multiturn and plain,
        }
    )


def _pairs_errors(config: PairsConfig) -> list[str]:
    data, shared = config.data, config.batch.share_prompt_prefix
    tokens, pair = config.batch.max_tokens_per_micro_batch, config.max_row_tokens
    return (shared_prefix_errors(config.layout.context_parallel_size) if shared else []) + broken(
        {
            "input_template is ignored without prompt_key (chosen and rejected hold whole texts): set prompt_key, or "
            "leave it out": data.input_template is not None and data.prompt_key is None,
            f"max_tokens_per_micro_batch={tokens} is below twice max_len = {pair} (chosen and rejected stay together): "
            f"use at least {pair}": tokens is not None and config.batch.max_len <= tokens < pair,
        }
    )


def _dpo_errors(config: DPOConfig, models: Models) -> list[str]:
    options = config.dpo
    own, reference = models["pretrain"], models.get("ref_pretrain", {})
    differ = [key for key in _ARCHITECTURE if key in own and key in reference and own[key] != reference[key]]
    return broken(
        {
            f"ref_pretrain={options.ref_pretrain} with lora_rank={config.lora.lora_rank} (the reference is the model "
            "without its adapters): leave ref_pretrain out": options.ref_pretrain and config.lora.lora_rank,
            f"label_smoothing={options.label_smoothing} with ipo=True (IPO has none): leave one out": (
                options.ipo and options.label_smoothing
            ),
            f"ref_pretrain={options.ref_pretrain} has another {', '.join(differ)} than pretrain (one model computes "
            "both): use a reference of the same architecture": differ,
        }
    )


def _kd_errors(config: KDConfig, tokens: object) -> list[str]:
    k = config.kd.teacher_top_k
    return broken(
        {
            f"teacher_top_k={k} is not below vocab_size={tokens} of pretrain (all other tokens are compared as one): "
            "leave it out for the whole vocabulary": k is not None and isinstance(tokens, int) and k >= tokens,
            f"teacher_top_k={k} with data_path (nothing is computed once for data that is read as it is drawn): leave "
            "teacher_top_k out": k is not None and config.data.data_path,
        }
    )


def _rm_errors(config: RMConfig) -> list[str]:
    prefix = config.rm.value_head_prefix
    return broken(
        {
            f"value_head_prefix={prefix} is not offered (Transformers' sequence classifiers name their head score, and "
            "under another name it loads nowhere else): leave it out": prefix != "score"
        }
    )


def _indexed_errors(data: SFTDataArguments) -> list[str]:
    """What is wrong with indexed data; data_path and dataset each leave the other's options without meaning."""
    own = {"data_path", "split", "eval_iters"}
    given = {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}
    unread = given.keys() - own - {"pretrain_mode"} if data.data_path else given.keys() & own
    why = "with data_path (it holds tokens already)" if data.data_path else "without data_path"
    errors = [f"{name}={given[name]} is ignored {why}: leave it out" for name in sorted(unread)]
    if not data.data_path:
        return errors + broken({"dataset is missing (or data_path: one is trained on): set it": not data.dataset})
    return (
        errors
        + blend_errors(data.data_path)
        + broken(
            {
                "data_path without pretrain_mode=True (documents have no prompts): set pretrain_mode": (
                    not data.pretrain_mode
                ),
                f"split={data.split} must be up to three numbers with commas between them, 0 or more and the first "
                "above: use 969,30,1, or 1,0,0 for no evaluation": parse_split(data.split) is None,
            }
        )
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


def check_chat(config: ChatConfig) -> list[str]:
    """Every mistake found in the options of a chat, none where it may start."""
    text, options = config.text, to_dict(config)
    model, errors = read_model("pretrain", config.model.pretrain)
    errors += place_errors(options) + limit_errors(options) + template_errors(text)
    errors += engine_errors(config.model.vllm_tensor_parallel_size, model)
    return errors + broken(
        {
            f"ta_prompt={text.ta_prompt} with apply_chat_template=True (a chat template begins the text itself): leave "
            "one out": text.ta_prompt is not None and text.apply_chat_template,
            f"csft_prompt={text.csft_prompt} is ignored without enable_csft: set it, or leave csft_prompt out": (
                text.csft_prompt != ChatTextArguments.csft_prompt and not text.enable_csft
            ),
        }
    )


def _models(config: PPOConfig | SupervisedConfig | ParityConfig) -> tuple[Models, list[str]]:
    """config.json of each model by the option that names it, and what is wrong with these, paths and single numbers."""
    model, options = config.model, to_dict(config)
    errors = place_errors(options) + limit_errors(options)
    tokenizer, judges = model.tokenizer or model.pretrain, set[str]()
    starts = {"pretrain": model.pretrain}
    if isinstance(config, PPOConfig):
        roles = megatron_roles(config)
        starts |= dict(role.start(config) for role in roles)
        judges = starts.keys() - {role.start(config)[0] for role in roles if role.trains}
    if isinstance(config, SupervisedConfig):
        starts |= config.other_models | ({} if config.ref_pretrain is None else {"ref_pretrain": config.ref_pretrain})
    models: dict[str, Mapping[str, Any]] = {}
    for key, path in starts.items():
        models[key], found = read_model(key, path)
        errors += found
        if key == "pretrain" or (key in judges and has_other_tokens(path, tokenizer)):  # judges then read text
            continue
        cure = "set critic_pretrain, or use" if key.startswith(LISTS) else "use"
        cure += " a checkpoint with the same tokenizer"
        errors += token_errors(key, path, tokenizer, models[key], models["pretrain"], cure=cure)
    return models, errors


def template_errors(data: RenderingArguments | ChatTextArguments) -> list[str]:
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


def _logging_errors(
    logging: LoggingArguments, *, evaluation: str, evaluates: bool, tries_save: bool = True
) -> list[str]:
    """`evaluation` is the option that gives evaluation data, `evaluates` whether there is any."""
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline"
    places = save_errors(logging.save, logging.load, starts_again=logging.load_checkpoint)
    places += ckpt_errors(logging.save, logging.ckpt_path)
    return (places if tries_save else []) + broken(
        {
            "no_load_optim=True has nothing to load without load: set load, or leave it out": (
                logging.no_load_optim and logging.load is None and not logging.load_checkpoint
            ),
            f"eval_interval={logging.eval_interval} has nothing to evaluate on: set {evaluation}": (
                logging.eval_interval is not None and not evaluates
            ),
            f"best_metric={logging.best_metric} has nothing to evaluate on: set {evaluation}": (
                logging.best_metric is not None and not evaluates
            ),
            f"best_metric_mode={logging.best_metric_mode} is ignored without best_metric: set it, or leave it out": (
                logging.best_metric_mode != LoggingArguments.best_metric_mode and logging.best_metric is None
            ),
            "use_wandb=True finds no key: set the environment variable WANDB_API_KEY, or WANDB_MODE=offline": (
                logging.use_wandb and not has_key
            ),
        }
    )
