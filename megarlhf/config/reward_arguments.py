"""Options of who scores the responses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RewardArguments:
    """Who scores the responses. Of several sources the sum is the reward, and one without a result leaves none."""

    reward_function: str | None = None
    """Python file that defines reward_func(queries, prompts, labels) and returns one number per query. Labels are as in
    the data: text, numbers, lists, ..."""
    reward_rule: Literal["math", "exact_match", "format"] | None = None
    """Built-in rule: math compares the final answer, in the last \\boxed{} if there is one, with the label, exact_match
    the whole text, format a pattern. Of a label that is a list any element is right."""
    reward_format: str | None = None
    """Regular expression that a response must match for reward_rule=format."""
    min_result_fraction: float = 0.5
    """Least part of a step's samples that must have a usable result. Below it the step is not trained. Above it a step
    with fewer results makes fewer optimizer steps, in proportion."""
    max_untrained_steps: int = 3
    """Steps in a row that may go untrained for that reason; then the run saves and stops."""
    reward_timeout_seconds: float = 30.0
    """Seconds for one call of the reward code. Past it the responses of the call are scored one by one, each within the
    same limit. All responses of a step together have this limit for each call that one process gets, ten times the
    limit for what is scored one by one, and 120 seconds; a response that has no reward by then is left out of
    training."""
    reward_num_workers: int | None = None
    """Processes that run the reward code side by side; what it keeps in memory each has for itself. None: 1 for
    reward_function, one for each core of this machine, but at most 8, for reward_rule."""
    reward_chunk_size: int = 1024
    """Responses in one call of the reward code, at most; with several processes a step's responses are also divided
    among them. The responses to a prompt are in one call unless they are more than this."""
    reward_env: tuple[str, ...] = ()
    """Names of environment variables that the reward code sees, such as the key of a service that it calls, besides
    those that programs need (PATH, HOME, LANG, PYTHONPATH, HF_HOME, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, ...)."""
    reward_skip_special_tokens: bool | None = None
    """Leave special tokens out of the responses that rewards read. With --no_reward_skip_special_tokens they are in,
    the end-of-turn token too, as in OpenRLHF's queries; rules look at what stands before that. None: they are in where
    a label holds one."""
