"""Where rewards come from, checked before anything starts."""

import os
import re

from megarlhf.config.check_files import file_for_text_errors, place_errors
from megarlhf.config.check_layout import broken
from megarlhf.config.check_numbers import limit_errors
from megarlhf.config.command_line import to_dict
from megarlhf.config.reward_arguments import RewardArguments, RewardCodeArguments
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.urls import TOKEN_VARIABLE, is_loopback, url_errors


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


def serve_errors(config: ServeConfig) -> list[str]:
    """What is wrong with a server of rewards."""
    serve, reward = config.serve, config.reward
    function, rule = reward.reward_function, reward.reward_rule
    options = to_dict(config)
    errors = broken(
        {
            f"reward_function={function} and reward_rule={rule} (one of them scores): set reward_function to a Python "
            "file, or reward_rule to math, exact_match or format": (function is None) == (rule is None),
            f"stop_texts={' '.join(serve.stop_texts)} is ignored without reward_rule (reward functions read whole "
            "queries): leave it out": serve.stop_texts and rule is None,
            f"host={serve.host} is open to other machines, and nothing keeps them out: set {TOKEN_VARIABLE} in the "
            "environment, or use host=127.0.0.1": not is_loopback(serve.host) and not os.environ.get(TOKEN_VARIABLE),
            f"ssl_keyfile={serve.ssl_keyfile} is ignored without ssl_certfile: set both": (
                serve.ssl_keyfile is not None and serve.ssl_certfile is None
            ),
            f"max_waiting_queries={serve.max_waiting_queries} is below max_queries={serve.max_queries} (a full request "
            "could never wait): raise it": serve.max_waiting_queries < serve.max_queries,
        }
        | {
            f"{name}={path} is not a file: give one in PEM format": path is not None and not os.path.isfile(path)
            for name, path in (("ssl_certfile", serve.ssl_certfile), ("ssl_keyfile", serve.ssl_keyfile))
        }
    )
    return errors + limit_errors(options) + place_errors(options) + code_errors(reward)


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
