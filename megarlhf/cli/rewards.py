"""The sources of a reward, as its options name them."""

import os
import sys

from megarlhf.config.reward_arguments import RewardArguments, RewardCodeArguments
from megarlhf.config.urls import TOKEN_VARIABLE
from megarlhf.parallel.device import num_cores
from megarlhf.reward.remote import RemoteOptions, RemoteReward
from megarlhf.reward.scorer import RewardScorer
from megarlhf.reward.sources import RewardSource

MAX_RULE_WORKERS = 8  # processes that score by a rule, where the user gives no number


def reward_sources(reward: RewardArguments, *, dry_run: bool = False) -> list[RewardSource]:
    """Code and servers, in the order of their weights; nothing runs yet. A dry run goes on where a server is not."""
    return [*code_sources(reward), *_servers(reward, is_required=not dry_run)]


def code_sources(reward: RewardCodeArguments) -> list[RewardSource]:
    """The reward function and the rule."""
    sources: list[RewardSource] = []
    for function, rule in ((reward.reward_function, None), (None, reward.reward_rule)):
        if function is None and rule is None:
            continue
        workers = 1 if rule is None else min(MAX_RULE_WORKERS, num_cores())
        sources.append(
            RewardScorer(
                function_path=function,
                rule=rule,
                rule_pattern=reward.reward_format,
                timeout_seconds=reward.reward_timeout_seconds,
                num_workers=reward.reward_num_workers or workers,
                chunk_size=reward.reward_chunk_size,
                passed_variables=reward.reward_env,
            )
        )
    return sources


def _servers(reward: RewardArguments, *, is_required: bool) -> list[RewardSource]:
    options = RemoteOptions(
        token=os.environ.get(TOKEN_VARIABLE) or None,
        timeout_seconds=reward.remote_rm_timeout_seconds,
        batch_size=reward.remote_rm_batch_size,
        concurrency=reward.remote_rm_concurrency,
        max_retries=reward.remote_rm_max_retries,
        is_required=is_required,
    )
    servers = reward.remote_rm_url
    for shared in (entry for entry in servers if "," in entry):
        said = "with a space between them their rewards are summed, as OpenRLHF 0.5 did"
        print(f"note: the servers of remote_rm_url={shared} share the requests; {said}", file=sys.stderr)
    names = ["remote"] if len(servers) == 1 else [f"remote_{number}" for number in range(len(servers))]
    return [RemoteReward(name, urls.split(","), options) for name, urls in zip(names, servers, strict=True)]
