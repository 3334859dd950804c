"""Where rewards come from, checked before anything starts."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_files import file_for_text_errors
from megarlhf.config.check_layout import broken
from megarlhf.config.reward_arguments import RewardArguments, RewardCodeArguments
from megarlhf.config.roles import reward_roles
from megarlhf.config.urls import TOKEN_VARIABLE, url_errors


def reward_errors(reward: RewardArguments, *, num_models: int = 0) -> list[str]:
    """What is wrong with the sources of the reward, of which so many are models."""
    function, rule, servers = reward.reward_function, reward.reward_rule, reward.remote_rm_url
    code = [entry for entry in servers if entry.endswith(".py")]
    errors = broken(
        {
            "reward_function=None and reward_rule=None (nothing scores): set reward_function to a Python file, "
            "reward_rule to math, exact_match or format, remote_rm_url to the address of a server, or in PPO "
            "reward_pretrain to a reward model": (
                function is None and rule is None and not servers and not num_models
            ),
            f"remote_rm_url={' '.join(code)} with reward_function={function} (one reward function scores): set one of "
            "them": code,
        }
    )
    default = RewardArguments()
    errors += [
        f"{name}={value} is ignored without remote_rm_url: set it, or leave {name} out"
        for name, value in vars(reward).items()
        if name.startswith("remote_rm_") and not servers and value != getattr(default, name)
    ]
    token, allow_http = os.environ.get(TOKEN_VARIABLE), reward.remote_rm_allow_http
    for url in (url for entry in servers if entry not in code for url in entry.split(",")):
        errors += url_errors("remote_rm_url", url, has_token=bool(token), allow_http=allow_http)
    num_sources = num_models + (function is not None) + (rule is not None) + len(servers)
    return errors + _weight_errors(reward.reward_weights, num_sources) + code_errors(reward)


def code_errors(reward: RewardCodeArguments) -> list[str]:
    """What is wrong with the options of reward code."""
    rule, pattern = reward.reward_rule, reward.reward_format
    errors = broken(
        {
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


def moments(model: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean and std of its rewards that a reward model's config.json has; None where it has not both."""
    found = [model.get(name) for name in ("mean", "std")]
    numbers = [float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        return None
    return numbers[0], numbers[1]


def _weight_errors(weights: tuple[float, ...] | None, num_sources: int) -> list[str]:
    shown = ",".join(map(str, weights or ()))
    return broken(
        {
            f"reward_weights={shown} has {len(weights or ())} numbers for {num_sources} sources (reward models, then "
            "function, rule and servers): give one for each": weights is not None and len(weights) != num_sources,
            f"reward_weights={shown} must be finite numbers": not all(map(math.isfinite, weights or ())),
        }
    )


def reward_model_errors(config: PPOConfig, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with reward models.

    Args:
        models: option that names a checkpoint -> its config.json.
    """
    judges, errors = reward_roles(config), list[str]()
    for name, values in vars(config.reward_layout).items():
        if judges and values and len(values) not in (1, len(judges)):
            shown = ",".join(map(str, values))
            errors.append(f"{name}={shown} has {len(values)} values for {len(judges)} models: give one, or as many")
    for role in judges:
        option, path = role.start(config)
        errors += broken(
            {
                f"{option}={path} is an adapter, without the weights that it belongs to: merge it (megarlhf "
                "merge_lora)": os.path.isfile(os.path.join(path, "adapter_config.json")),
                f"normalize_reward=True needs mean and std in config.json of {option}={path} (megarlhf rm writes them "
                "with an evaluation): leave it out, or write them there": (
                    config.algorithm.normalize_reward and models.get(option) and moments(models[option]) is None
                ),
            }
        )
    return errors
