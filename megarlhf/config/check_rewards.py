"""Where rewards come from, checked before anything starts."""

import os
import re

from megarlhf.config.check_files import file_for_text_errors
from megarlhf.config.check_layout import broken
from megarlhf.config.reward_arguments import RewardArguments, RewardCodeArguments
from megarlhf.config.urls import TOKEN_VARIABLE, url_errors


def reward_errors(reward: RewardArguments) -> list[str]:
    """What is wrong with the sources of the reward."""
    function, rule, servers = reward.reward_function, reward.reward_rule, reward.remote_rm_url
    code = [entry for entry in servers if entry.endswith(".py")]
    errors = broken(
        {
            "reward_function=None and reward_rule=None (nothing scores): set reward_function to a Python file, "
            "reward_rule to math, exact_match or format, or remote_rm_url to the address of a server": (
                function is None and rule is None and not servers
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
    return errors + code_errors(reward)


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
