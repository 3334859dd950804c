"""The run of select.py, whose options are checked already."""

import math
from pathlib import Path

from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.loop_arguments import SelectArguments, SelectConfig
from megarlhf.data.loading import load_rows
from megarlhf.data.selection import SELECTIONS, Selection, conditional_sft, group_numbers, rewards_of
from megarlhf.formats.growing_lines import GrowingLines


def run(config: SelectConfig, *, dry_run: bool) -> int:
    """Select; returns the exit status."""
    if dry_run:
        print(to_yaml(config))
    else:
        print(f"{select_file(config.select)}\nselected: {config.select.output}")
    return 0


def select_file(options: SelectArguments) -> Selection:
    """Write what is selected of a file of scored samples; see select."""
    found = select(options)
    with GrowingLines(Path(options.output), to_dict(SelectConfig(select=options))) as lines:
        lines.keep(0)
        lines.append(found.rows)
    return found


def select(options: SelectArguments) -> Selection:
    """What is selected of a file of scored samples.

    Raises:
        ValueError: rows without input, output or reward.
    """
    samples = load_rows(options.dataset)

    def check(index: int) -> None:
        for key in ("input", "output"):
            if not isinstance(samples.value(index, key, option="key"), str):
                raise ValueError(f"{key} is not text")
        reward = samples.rows[index].get("reward", "nothing")
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool) and not math.isinf(reward)
        if reward is not None and not is_number:
            raise ValueError(f"reward is {reward!r:.40}, not a finite number or null: score the file (megarlhf score)")

    samples.collect(check)
    function, rows = SELECTIONS[options.post_processor], samples.rows
    own = {"template": options.reward_template} if function is conditional_sft else {}
    rewards = rewards_of(rows, trainable=True, normalize=options.normalize_reward)
    return function(rows, group_numbers(rows), rewards, **own)
