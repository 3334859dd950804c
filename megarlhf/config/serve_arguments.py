"""Options of `megarlhf serve-rm`."""

from dataclasses import dataclass, field

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import config_of
from megarlhf.config.layouts import RewardLayoutArguments
from megarlhf.config.loop_arguments import RewardModelsArguments
from megarlhf.config.reward_arguments import RewardCodeArguments


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Where the server listens, and what it takes. Clients must send the token in MEGARLHF_RM_TOKEN where it is set."""

    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine's own need a token."""
    port: int = 5000
    """Port to listen at. 0: any that is free."""
    ssl_certfile: str | None = None
    """PEM file of a certificate, to serve https."""
    ssl_keyfile: str | None = None
    """PEM file of its key, where that is another."""
    stop_texts: tuple[str, ...] = ()
    """Texts that may end a query and are no part of the answer for reward_rule, such as the end-of-turn token."""
    max_len: int = 2048
    """Longest query in tokens; a request with a longer one is refused. Where code scores, 4 characters are a token."""
    max_batch_tokens: int = 16384
    """Tokens that are scored in one call: several requests together, or a single one that may have more. A rank of a
    reward model computes as many at once, at most."""
    max_queries: int = 1024
    """Queries in a request; more are refused."""
    max_waiting_queries: int = 8192
    """Queries of all clients that may wait; requests beyond them are sent away, and come back later."""
    max_body_mib: int = 16
    """Longest body of a request in MiB."""


@dataclass(frozen=True, kw_only=True)
class ServeForwardArguments:
    """How a reward model computes."""

    bf16: bool = False
    """Compute in bfloat16."""
    normalize_reward: bool = False
    """Subtract from the model's score the mean that its config.json has and divide by the std there."""
    start_timeout_seconds: float = 300.0
    """Seconds for its processes to be up and the model loaded."""
    phase_timeout_seconds: float = 1800.0
    """Seconds for the scores of one call; past them the server ends."""
    gpu_memory_gib: float | None = None
    """Memory of each GPU in GiB, which the reward model must fit into. None: this machine's GPUs tell; without any,
    the plan is printed and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve rewards over HTTP, to megarlhf's and OpenRLHF's --remote_rm_url."""

    serve: ServeArguments = field(default_factory=ServeArguments)
    reward: RewardCodeArguments = field(default_factory=RewardCodeArguments)
    models: RewardModelsArguments = field(default_factory=RewardModelsArguments)
    reward_layout: RewardLayoutArguments = field(default_factory=RewardLayoutArguments)
    forward: ServeForwardArguments = field(default_factory=ServeForwardArguments)

    def as_ppo(self) -> PPOConfig:
        """An RL run with this reward model, of which nothing else is started."""
        return config_of(
            PPOConfig,
            self,
            pretrain=self.models.reward_pretrain,
            prompt_data="",
            save="",
            ray=False,
            advantage_estimator="reinforce",
            max_tokens_per_micro_batch=self.serve.max_batch_tokens,
            share_prompt_prefix=True,
        )
