"""The run of evaluate.py, whose options are checked already: load the prompts, start the engines, measure."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megarlhf.cli.errors import all_or_errors, running
from megarlhf.cli.prompt_data import load_evaluation, resolve_special_tokens
from megarlhf.cli.reward_models import give_models, opened_models
from megarlhf.cli.rewards import model_sources, reward_sources
from megarlhf.cli.run import resolved_files
from megarlhf.cli.run_score import check_results
from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.eval_config import EvalConfig
from megarlhf.reward.sources import SumOfSources
from megarlhf.trainers.evaluation import Answers, answer, answers_metrics


def run(config: EvalConfig, *, dry_run: bool) -> int:
    """Measure; returns the exit status."""
    config = replace(config, reward=config.reward.resolved())
    output, reward, ppo = Path(config.result.output).absolute(), config.reward, config.as_ppo()
    given = [*model_sources(ppo), *reward_sources(reward, dry_run=dry_run)]
    with closing(SumOfSources(given, reward.reward_weights)) as sources:
        (sets, stops), models, _ = all_or_errors(
            [partial(load_evaluation, ppo), partial(opened_models, ppo, engines=True), sources.check]
        )
        ppo = resolve_special_tokens(models.config, [prompt.label for members in sets.values() for prompt in members])
        counts = {name: len(members) for name, members in sets.items()}
        if dry_run:
            print(f"{to_yaml(config)}\n{resolved_files(ppo.model, ppo.data)}\n\nprompts: {counts}\n{models.text()}")
            return 0
        from megarlhf.cluster import launch  # with vLLM behind it: nothing above needs it

        with running(), launch.open_judged_engines(ppo, models.plan, stop_token_ids=stops) as (engines, judges, phases):
            give_models(sources.sources, judges)
            scoring = partial(phases.reward, is_last=False)
            answers = answer(engines, sources, sets, ppo, generating=phases.evaluate, scoring=scoring)
    metrics = answers_metrics(answers, ppo)
    print_table(metrics, counts)
    result = {"metrics": metrics, "num_prompts": counts, "seconds": phases.seconds(), "options": to_dict(config)}
    _write(output, json.dumps(result, indent=1) + "\n")
    if config.result.responses is not None:
        _write(Path(config.result.responses), "".join(json.dumps(row) + "\n" for row in response_rows(answers)))
    print(f"results: {output}")
    rewards = [row["reward"] for row in response_rows(answers)]
    check_results(np.array([np.nan if value is None else value for value in rewards]), reward)
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def print_table(metrics: Mapping[str, float], counts: Mapping[str, int]) -> None:
    """A row for each metric, a column for each set that has a name, and one for all together."""
    prefixes = [f"eval/{name}/" for name in counts if name] + ["eval/"]
    numbers = [*(str(count) for name, count in counts.items() if name), str(sum(counts.values()))]
    table = Table("", *(prefix.split("/")[1] or "all" for prefix in prefixes))
    table.add_row("prompts", *numbers)
    for key in (key.removeprefix("eval/") for key in metrics if key.count("/") == 1):
        table.add_row(key, *(f"{metrics[p + key]:.4g}" if p + key in metrics else "" for p in prefixes))
    Console().print(table)


def response_rows(answers: Mapping[str, Answers]) -> Iterator[dict[str, Any]]:
    """A line of the file for each response; sample is None for the greedy one."""
    for name, found in answers.items():
        for is_greedy, samples in ((True, found.greedy), (False, found.sampled)):
            for sample in samples:
                yield {
                    "set": name,
                    "index": sample.prompt.index,
                    "sample": None if is_greedy else sample.sample_id,
                    "input": sample.prompt.text,
                    "output": sample.response_text.removesuffix(sample.stop_text),
                    "label": sample.prompt.label,
                    "reward": sample.reward,
                    "finish_reason": sample.finish_reason,
                }
