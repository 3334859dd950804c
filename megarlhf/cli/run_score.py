"""The run of score.py, whose options are checked already: read the samples, ask the sources, write the file."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megarlhf.cli.errors import RunError, all_or_errors, running
from megarlhf.cli.reward_models import OpenedModels, opened_models, running_models
from megarlhf.cli.rewards import model_sources, reward_identity, reward_sources
from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.loop_arguments import ScoreArguments, ScoreConfig
from megarlhf.config.loop_stages import reward_models_config
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.data.loading import load_rows
from megarlhf.data.rows import Rows, json_value
from megarlhf.data.selection import Rewards, rewards_of
from megarlhf.data.token_ids import fingerprint
from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.formats.growing_lines import GrowingLines
from megarlhf.metrics.sinks import ConsoleSink
from megarlhf.reward.sources import SumOfSources

_NO_TOKENS = np.zeros(0, dtype=np.int32)
# Options that decide no score, but where it goes, how long one may take, and how many may be missing.
FREE = (
    "output reward_timeout_seconds remote_rm_timeout_seconds remote_rm_concurrency remote_rm_max_retries "
    "remote_rm_allow_http max_no_result_fraction min_result_fraction start_timeout_seconds phase_timeout_seconds "
    "gpu_memory_gib"
).split()
_PART = 2048  # samples that are scored and written at a time, at least


def load_samples(score: ScoreArguments) -> tuple[Rows, list[Sample], list[int]]:
    """Rows of the file, the samples in them, and where the parts begin that are scored at a time, the end included.

    Rows that follow each other with one prompt, or one `place` of it, are samples of one group, which is not cut.

    Raises:
        ValueError: rows without a prompt or a response.
    """
    rows = load_rows(score.dataset, limit=score.max_samples)

    def read(index: int) -> tuple[str, str, Any]:
        texts = []
        for option in ("input_key", "output_key"):
            key = getattr(score, option)
            text = rows.rows[index].get(key) if option == "output_key" else rows.value(index, key, option=option)
            if not isinstance(text, str):
                raise ValueError(f"{option}={key} holds {text!r:.40}, not text: set {option}")
            texts.append(text)
        return texts[0], texts[1], json_value(rows.rows[index].get(score.label_key))

    read_rows = rows.collect(read)
    samples: list[Sample] = []
    borders, before = [0], None
    group_id, sample_id = -1, 0
    for index, (prompt, response, label) in enumerate(read_rows):
        group = (prompt, rows.rows[index].get("place"))
        stop = str(rows.rows[index].get("stop_text") or "")
        if group != before:
            if index - borders[-1] >= _PART:
                borders.append(index)
                group_id = -1
            group_id, sample_id, before = group_id + 1, 0, group
        samples.append(
            Sample(
                prompt=Prompt(index=index, text=prompt, token_ids=_NO_TOKENS, label=label),
                group_id=group_id,
                sample_id=sample_id,
                response_length=0,
                response_text=response + stop,
                stop_text=stop,
                finish_reason="length" if rows.rows[index].get("finish_reason") == "length" else "stop",
                weight_version=0,
            )
        )
        sample_id += 1
    return rows, samples, [*borders, len(samples)]


@contextmanager
def checked_sources(config: ScoreConfig, *, dry_run: bool) -> Iterator[tuple[SumOfSources, OpenedModels | None]]:
    """The sources of the reward, checked, their code loaded; and the plan of the models among them.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    ppo, reward = reward_models_config(config), config.reward.resolved()
    models = [] if ppo is None else model_sources(ppo, read_text=True)
    sources = SumOfSources([*models, *reward_sources(reward, dry_run=dry_run)], reward.reward_weights)
    with closing(sources):
        steps: list[Callable[[], Any]] = [sources.check]
        if ppo is not None:
            steps.append(partial(opened_models, ppo))
        _, *opened = all_or_errors(steps)
        yield sources, next(iter(opened), None)


def run(config: ScoreConfig, *, dry_run: bool) -> int:
    """Score what is not scored yet; returns the exit status."""
    score, output = config.score, Path(config.score.output)
    rows, samples, borders = load_samples(score)
    with checked_sources(config, dry_run=dry_run) as (sources, models):
        if dry_run:
            print(to_yaml(config))
        print(f"{len(samples)} samples of {score.dataset}; sources of the reward: {_names(sources)}")
        if models is not None:
            print(models.text())
        if dry_run:
            return 0
        texts = [[sample.prompt.text, sample.response_text, sample.prompt.label] for sample in samples]
        identity = {name: value for name, value in to_dict(config).items() if name not in FREE}
        identity["samples"] = fingerprint(_NO_TOKENS, _NO_TOKENS.astype(np.int64), texts)
        identity["reward_models"] = None if models is None else reward_identity(models.config)
        with GrowingLines(output, identity) as lines:
            finished = max(border for border in borders if border <= lines.num_lines)
            lines.keep(finished)
            parts = [pair for pair in pairwise(borders) if pair[0] >= finished]
            with running(), running_models(models if parts else None, sources.sources):
                console = ConsoleSink(total_steps=len(samples), first_step=finished, unit="samples")
                with closing(console):
                    for first, last in parts:
                        started = time.perf_counter()
                        found = sources.score(Rollout(samples=samples[first:last], tokens=()))
                        pairs = zip(rows.rows[first:last], found, strict=True)
                        lines.append(json_value(row) | _scored(sample) for row, sample in pairs)
                        speed = (last - first) / (time.perf_counter() - started)
                        console.log(last, {"perf/samples_per_second": speed})
    rewards = rewards_of(load_rows(str(output), columns=("reward",)).rows)
    print(f"{summary(rewards)}\nscored: {output}")
    check_results(rewards, config.reward.resolved())
    return 0


def _scored(sample: Sample) -> dict[str, Any]:
    """What a row has besides its own, under the names that select reads."""
    response = sample.response_text.removesuffix(sample.stop_text)
    return {"input": sample.prompt.text, "output": response, "reward": sample.reward, "parts": sample.parts}


def _names(sources: SumOfSources) -> str:
    return ", ".join(source.name for source in sources.sources)


def summary(rewards: Rewards) -> str:
    """A line on the rewards of a file."""
    missing = int(np.isnan(rewards).sum())
    if missing == len(rewards):
        return f"{missing} samples, all without a result"
    mean, deviation = float(np.nanmean(rewards)), float(np.nanstd(rewards))
    return f"reward {mean:.4f} on average, std {deviation:.4f}; {missing} of {len(rewards)} samples without a result"


def check_results(rewards: Rewards, reward: RewardArguments) -> None:
    """Raises RunError where too few samples have a result; the file is there."""
    missing = int(np.isnan(rewards).sum())
    if not reward.allows(missing, of=len(rewards)):
        raise RunError(
            f"{missing / len(rewards):.1%} of the samples have no result, where min_result_fraction="
            f"{reward.min_result_fraction} and max_no_result_fraction={reward.max_no_result_fraction}: see the "
            "warnings above for the reasons, and score the file again"
        )
