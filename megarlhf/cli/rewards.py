"""The sources of a reward, as its options name them."""

import os
import sys
from typing import Any

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_rewards import moments
from megarlhf.config.reward_arguments import RewardArguments, RewardCodeArguments
from megarlhf.config.roles import reward_roles
from megarlhf.config.urls import TOKEN_VARIABLE
from megarlhf.formats.huggingface import HFWeights, read_config
from megarlhf.parallel.device import host_memory_bytes, num_cores
from megarlhf.reward.model import RewardModel
from megarlhf.reward.remote import RemoteOptions, RemoteReward
from megarlhf.reward.scorer import RewardScorer
from megarlhf.reward.sources import RewardSource

MAX_RULE_WORKERS = 8  # processes that score by a rule, where the user gives no number


def reward_sources(reward: RewardArguments, *, dry_run: bool = False) -> list[RewardSource]:
    """Code and servers, in the order of their weights; nothing runs yet. A dry run goes on where a server is not."""
    return [*code_sources(reward), *_servers(reward, is_required=not dry_run)]


def model_sources(config: PPOConfig, *, read_text: bool = False) -> list[RewardModel]:
    """The reward models, whose weights come first; nothing runs yet. Without the policy's tokens they read text."""
    return [
        RewardModel(
            f"reward_model{role.name.removeprefix('reward')}",
            role.name,
            role.start(config)[1],
            option=role.start(config)[0],
            policy_tokenizer=None if read_text else config.model.tokenizer or config.model.pretrain,
            apply_chat_template=config.data.apply_chat_template,
            max_tokens=config.max_row_tokens if read_text else config.micro_batch_tokens,
            normalize=config.algorithm.normalize_reward,
        )
        for role in reward_roles(config)
    ]


def reward_identity(config: PPOConfig) -> list[dict[str, Any]] | None:
    """What a checkpoint and the reward models must agree on: their weights, and what scores are normalised by."""
    found = []
    for option, directory in (role.start(config) for role in reward_roles(config)):
        scale = moments(vars(read_config(directory, option=option))) if config.algorithm.normalize_reward else None
        weights = HFWeights(directory, option=option).fingerprint()
        found.append({"weights": weights, "mean and std": None if scale is None else list(scale)})
    return found or None


def code_sources(reward: RewardCodeArguments) -> list[RewardSource]:
    """The reward function and the rule."""
    sources: list[RewardSource] = []
    for function, rule in ((reward.reward_function, None), (None, reward.reward_rule)):
        if function is None and rule is None:
            continue
        workers = reward.reward_num_workers or (1 if rule is None else min(MAX_RULE_WORKERS, num_cores()))
        gib = reward.reward_memory_gib
        sources.append(
            RewardScorer(
                function_path=function,
                rule=rule,
                rule_pattern=reward.reward_format,
                timeout_seconds=reward.reward_timeout_seconds,
                num_workers=workers,
                chunk_size=reward.reward_chunk_size,
                passed_variables=reward.reward_env,
                memory_bytes=host_memory_bytes() // 2 // workers if gib is None else int(gib * 2**30),
                network=reward.reward_network,
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
