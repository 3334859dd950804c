"""Where rewards come from, checked before anything starts."""

import os
import re

from megarlhf.config.check_files import file_for_text_errors
from megarlhf.config.check_layout import broken
from megarlhf.config.reward_arguments import RewardArguments


def reward_errors(reward: RewardArguments) -> list[str]:
    """What is wrong with the sources of the reward."""
    function, rule, pattern = reward.reward_function, reward.reward_rule, reward.reward_format
    errors = broken(
        {
            "reward_function=None and reward_rule=None (nothing scores): set reward_function to a Python file, or "
            "reward_rule to math, exact_match or format": function is None and rule is None,
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
