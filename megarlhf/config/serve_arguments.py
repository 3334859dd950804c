"""Options of `megarlhf serve-rm`."""

from dataclasses import dataclass, field

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
    """Tokens that are scored in one call: several requests together, or a single one that may have more."""
    max_queries: int = 1024
    """Queries in a request; more are refused."""
    max_waiting_queries: int = 8192
    """Queries of all clients that may wait; requests beyond them are sent away, and come back later."""
    max_body_mib: int = 16
    """Longest body of a request in MiB."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve rewards over HTTP, to megarlhf's and OpenRLHF's --remote_rm_url."""

    serve: ServeArguments = field(default_factory=ServeArguments)
    reward: RewardCodeArguments = field(default_factory=RewardCodeArguments)
