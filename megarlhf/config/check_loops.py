"""All that can be known to be wrong with loops over batches, and with an evaluation, before PyTorch is imported."""

import os
from collections.abc import Mapping
from typing import Any

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_files import has_other_tokens, place_errors, read_model, token_errors
from megarlhf.config.check_layout import broken, cluster_errors, layout_errors
from megarlhf.config.check_numbers import engine_errors, length_errors, limit_errors
from megarlhf.config.check_rewards import reward_errors, reward_model_errors
from megarlhf.config.check_save import directory_errors, save_errors
from megarlhf.config.checks import check_supervised, evaluation_errors, template_errors
from megarlhf.config.command_line import to_dict
from megarlhf.config.eval_config import EvalConfig
from megarlhf.config.loop_arguments import (
    ConditionArguments,
    ForwardArguments,
    GenerateConfig,
    IterateConfig,
    ScoreConfig,
    SelectConfig,
)
from megarlhf.config.loop_stages import (
    evaluate_config,
    generate_config,
    reward_models_config,
    score_config,
    train_config,
)
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.config.roles import reward_roles
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOArguments
from megarlhf.formats.data_names import held_out_part, probability_errors


def check_generate(config: GenerateConfig) -> list[str]:
    """Every mistake found in the options of a generation, none where it may start."""
    data, number = config.data, config.generate.n_samples_per_prompt
    errors = _answering_errors(config)
    errors += probability_errors("prompt_data_probs", data.prompt_data_probs, "prompt_data", data.prompt_data)
    said = f"n_samples_per_prompt={number} with greedy=True (all would be one response): use 1"
    return errors + broken({said: config.generate.greedy and number > 1}) + output_errors(config.generate.output)


def check_eval(config: EvalConfig) -> list[str]:
    """Every mistake found in the options of an evaluation by itself, none where it may start."""
    responses, models = config.result.responses, config.models.reward_pretrain
    errors = _answering_errors(config) + _untrained_errors(config.reward)
    errors += evaluation_errors(config.evaluation, is_read=config.reward.judges or responses is not None)
    errors += output_errors(config.result.output, suffix=".json")
    errors += [] if responses is None else output_errors(responses, option="responses")
    if config.evaluation.eval_data is None:
        return [*errors, "eval_data is missing (it is what is measured on): set it"]
    ppo = config.as_ppo()
    errors += reward_errors(config.reward, num_models=len(reward_roles(ppo)))
    errors += unread_errors(config) if models is None else model_errors(ppo, reads_tokens=True)
    return list(dict.fromkeys(errors))


def _answering_errors(config: GenerateConfig | EvalConfig) -> list[str]:
    """Models, prompts and their lengths, where engines alone run."""
    rollout, options = config.rollout, to_dict(config)
    model, errors = read_model("pretrain", config.model.pretrain)
    errors += place_errors(options) + limit_errors(options) + template_errors(config.data)
    errors += engine_errors(config.cluster.vllm_tensor_parallel_size, model)
    longest = rollout.prompt_max_len + rollout.generate_max_len
    return errors + length_errors("prompt_max_len + generate_max_len", longest, None, {"pretrain": model})


def check_score(config: ScoreConfig) -> list[str]:
    """Every mistake found in the options of a scoring, none where it may start."""
    score, reward, ppo = config.score, config.reward, reward_models_config(config)
    errors = place_errors(to_dict(config)) + limit_errors(to_dict(config))
    errors += reward_errors(reward, num_models=0 if ppo is None else len(reward_roles(ppo)))
    errors += unread_errors(config) if ppo is None else model_errors(ppo)
    said = "reward_skip_special_tokens is ignored (responses are text already): leave it out, or set megarlhf "
    said += "generate's skip_special_tokens"
    errors += broken({said: reward.reward_skip_special_tokens is not None}) + _untrained_errors(reward)
    return errors + output_errors(score.output, score.dataset)


def model_errors(ppo: PPOConfig, *, reads_tokens: bool = False) -> list[str]:
    """What is wrong with reward models and their layouts, and where they read the policy's tokens with these."""
    errors, models = list[str](), dict[str, Mapping[str, Any]]()
    tokenizer = ppo.model.tokenizer or ppo.model.pretrain
    for role in reward_roles(ppo):
        option, path = role.start(ppo)
        models[option], found = read_model(option, path)
        errors += found + layout_errors(role.layout(ppo), {option: models[option]}, role.prefix)
        if reads_tokens and not has_other_tokens(path, tokenizer):
            policy, _ = read_model("pretrain", ppo.model.pretrain)
            errors += token_errors(option, path, tokenizer, models[option], policy)
    if reads_tokens:
        errors += length_errors("prompt_max_len + generate_max_len", ppo.max_row_tokens, None, models)
    return list(dict.fromkeys(errors + cluster_errors(ppo) + reward_model_errors(ppo, models)))


def unread_errors(config: ScoreConfig | ServeConfig | EvalConfig) -> list[str]:
    """Options of reward models without any."""
    own = vars(config.reward_layout) | {"reward_num_gpus_per_node": config.models.reward_num_gpus_per_node}
    if isinstance(config, EvalConfig):
        default = ForwardArguments()
        own |= {name: value for name, value in vars(config.forward).items() if value != getattr(default, name)}
    return [
        f"{name}={value} is ignored without reward_pretrain (there is no reward model): leave it out"
        for name, value in own.items()
        if value not in (None, ())
    ]


def _untrained_errors(reward: RewardArguments) -> list[str]:
    ignored = reward.max_untrained_steps != RewardArguments.max_untrained_steps
    return broken({"max_untrained_steps is ignored here (nothing is trained step by step): leave it out": ignored})


def check_select(config: SelectConfig) -> list[str]:
    """Every mistake found in the options of a selection, none where it may start."""
    select = config.select
    errors = place_errors(to_dict(config)) + _condition_errors(select, select.post_processor == "csft")
    return errors + output_errors(select.output, select.dataset)


def _condition_errors(given: ConditionArguments, conditional: bool, *, models: bool = False) -> list[str]:
    template = given.reward_template
    ignored = [
        f"{name}={value} is ignored (conditional SFT alone writes rewards into prompts): leave it out"
        for name in ("reward_template", *(() if models else ("normalize_reward",)))
        if not conditional and (value := getattr(given, name)) != getattr(ConditionArguments, name)
    ]
    missing = "{input}" not in template or "{reward}" not in template
    return ignored + broken({f"reward_template={template!r} must hold {{input}} and {{reward}}": missing})


def output_errors(
    output: str, dataset: str | None = None, *, option: str = "output", suffix: str = ".jsonl"
) -> list[str]:
    """A file that cannot be written, or that is read as well."""
    what = "one object a line" if suffix == ".jsonl" else "one object"
    errors = broken(
        {
            f"{option}={output} must end in {suffix} ({what} is written)": not output.endswith(suffix),
            f"{option}={output} is a directory: name a file": os.path.isdir(output),
            f"{option}={output} is dataset too (it is read while output is written): name another file": (
                dataset is not None and os.path.abspath(output) == os.path.abspath(dataset)
            ),
        }
    )
    return errors + directory_errors(os.path.dirname(output) or ".", option=option)


def check_iterate(config: IterateConfig) -> list[str]:
    """Every mistake found in the options of a loop and in those of all of its stages, none where it may start."""
    iterate, method, model = config.iterate, config.iterate.method, config.model.pretrain
    dpo, conditional, number = method == "iterative_dpo", method == "conditional_sft", iterate.n_samples_per_prompt
    given = {name: value for name, value in vars(config.dpo).items() if value != getattr(DPOArguments, name)}
    errors = broken(
        {
            f"n_samples_per_prompt={number} with method={method} (it compares a prompt's samples): use 2 or more": (
                number < 2 and not conditional
            ),
            f"reference=moving is ignored with method={method} (SFT has no reference): leave it out": (
                iterate.reference == "moving" and not dpo
            ),
            f"reference=fixed with lora_rank={config.lora.lora_rank} (the reference is the model without its adapters, "
            "the one before each round): set reference=moving": (
                dpo and iterate.reference == "fixed" and config.lora.lora_rank > 0
            ),
            f"ref_pretrain={config.dpo.ref_pretrain} with reference=moving: leave one out": (
                dpo and iterate.reference == "moving" and config.dpo.ref_pretrain is not None
            ),
            f"csft_prompt={iterate.csft_prompt!r} is ignored with method={method}: leave it out": (
                not conditional and iterate.csft_prompt != type(iterate).csft_prompt
            ),
            "enable_ema=True is ignored (a round starts from the last weights of the one before): leave it out": (
                config.optimizer.enable_ema
            ),
            f"eval_split={config.data.eval_split} has nothing to evaluate on: set eval_data, or a part such as 0.03 of "
            "what each round selects": (
                config.data.eval_data is None and held_out_part(config.data.eval_split or "0") is None
            ),
            "WORLD_SIZE is set (megarlhf iterate starts the ranks of its stages itself): start it without torchrun": (
                "WORLD_SIZE" in os.environ
            ),
        }
        | {
            f"{name}={value} is ignored with method={method} (it is DPO's): leave it out": not dpo
            for name, value in given.items()
        }
    )
    errors += limit_errors(to_dict(config))
    errors += _condition_errors(iterate, conditional, models=config.models.reward_pretrain is not None)
    errors += save_errors(config.logging.save, None, starts_again=True)
    errors += check_generate(generate_config(config, 1, model))
    scoring = score_config(config, config.data.prompt_data, f"{config.logging.save}/scored.jsonl")
    errors += check_score(scoring) + place_errors(to_dict(config))
    if config.data.eval_data is not None:
        errors += check_generate(evaluate_config(config, 0, model))
    training = check_supervised(train_config(config, 1, model, dataset=config.data.prompt_data))  # there is no other
    found = [error for error in [*errors, *training] if not error.startswith("dataset=")]
    return list(dict.fromkeys(found))
