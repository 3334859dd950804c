"""Options of who scores the responses."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RewardCodeArguments:
    """Code that scores responses, in processes of its own."""

    reward_function: str | None = None
    """Python file that defines reward_func(queries, prompts, labels) and returns one number per query. Labels are as in
    the data: text, numbers, lists, ..."""
    reward_rule: Literal["math", "exact_match", "format"] | None = None
    """Built-in rule: math compares the final answer, in the last \\boxed{} if there is one, with the label, exact_match
    the whole text, format a pattern. Of a label that is a list any element is right."""
    reward_format: str | None = None
    """Regular expression that a response must match for reward_rule=format."""
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
    reward_memory_gib: float | None = None
    """GiB of memory that each process of reward code may have, and each that it starts; past it Python raises
    MemoryError, which leaves no result. None: half of this machine's memory, shared out over reward_num_workers."""
    reward_network: bool = False
    """Let reward code use the network, to call a service for instance. Otherwise it has the loopback interface of its
    own namespace alone, as far as the system keeps it away."""


@dataclass(frozen=True, kw_only=True)
class RewardArguments(RewardCodeArguments):
    """Who scores the responses. Of several sources the sum is the reward, and one without a result leaves none."""

    remote_rm_url: tuple[str, ...] = ()
    """Address of a server that scores, such as http://HOST:5000/get_reward of megarlhf serve-rm or OpenRLHF. Several
    with commas between them answer alike and share the requests; several with spaces are sources of their own, whose
    rewards are summed. The path of a .py file means the same as reward_function. A token that servers ask for is read
    from the environment variable MEGARLHF_RM_TOKEN."""
    reward_weights: tuple[float, ...] | None = None
    """What each source is multiplied by, with commas between the numbers: those of reward_pretrain come first, then
    reward_function, reward_rule, and those of remote_rm_url. None: 1 each."""
    remote_rm_batch_size: int = 32
    """Responses in a request, at most. The responses to a prompt are in one request unless they are more than this."""
    remote_rm_concurrency: int = 8
    """Requests that are under way at each server."""
    remote_rm_timeout_seconds: float = 180.0
    """Seconds for the scores of all responses of a step. A response that has none by then has no result."""
    remote_rm_max_retries: int = 5
    """Repetitions of a request that fails for a reason that may pass, such as a lost connection or a busy server, after
    half a second, a second, two, and so on."""
    remote_rm_allow_http: bool = False
    """Send the token to other machines over http too, where everybody on the way can read it."""
    max_no_result_fraction: float | None = None
    """Largest part of a step's samples without a result. Above it the run saves and stops before it trains on the
    rest, and an evaluation reports only counts. None: 0.1 with remote_rm_url, no limit without."""
    min_result_fraction: float = 0.5
    """Least part of a step's samples that must have a usable result. Below it the step is not trained, and an
    evaluation reports only counts. Above it a step with fewer results makes fewer optimizer steps, in proportion."""
    max_untrained_steps: int = 3
    """Steps in a row that may go untrained for that reason; then the run saves and stops."""
    reward_skip_special_tokens: bool | None = None
    """Leave special tokens out of the responses that rewards read. With --no_reward_skip_special_tokens they are in,
    the end-of-turn token too, as in OpenRLHF's queries; rules look at what stands before that. None: they are in where
    a label holds one, and with remote_rm_url."""

    @property
    def judges(self) -> bool:
        """Whether a function or a rule scores, which say what is right; models and servers have their own scales."""
        is_code = any(entry.endswith(".py") for entry in self.remote_rm_url)
        return is_code or self.reward_function is not None or self.reward_rule is not None

    def allows(self, missing: int, *, of: int) -> bool:
        """Whether so many samples may have no result: min_result_fraction and max_no_result_fraction."""
        part, most = missing / of, self.max_no_result_fraction
        return 1.0 - part >= self.min_result_fraction and (most is None or part <= most)

    def resolved(self) -> "RewardArguments":
        """With what remote_rm_url decides: a Python file is the reward function, queries hold special tokens as
        OpenRLHF's do, and a step that servers leave without many results ends the run."""
        if not self.remote_rm_url:
            return self
        files = [entry for entry in self.remote_rm_url if entry.endswith(".py")]
        found = self
        if len(files) == 1 and self.reward_function is None:
            servers = tuple(entry for entry in self.remote_rm_url if entry not in files)
            found = replace(found, reward_function=files[0], remote_rm_url=servers)
        if found.reward_skip_special_tokens is None:
            found = replace(found, reward_skip_special_tokens=False)
        if found.remote_rm_url and found.max_no_result_fraction is None:
            found = replace(found, max_no_result_fraction=0.1)
        return found
