"""The run of iterate.py, whose options are checked already: rounds of stages, each a program of this package.

    <save>/stages.jsonl                    finished stages
    <save>/round_000/eval_scored.jsonl     evaluation of the model before the first round
    <save>/round_001/samples.jsonl, scored.jsonl, selected.jsonl, train/, eval_samples.jsonl, eval_scored.jsonl
    <save>/hf                              link to the model of the last round

A stage that was killed runs again, and goes on where its own program can: generating and scoring after their last part,
training from its last checkpoint.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from megarlhf.cli import run_generate, run_score
from megarlhf.cli.disk import check_disk_space, space_problems, stored_bytes
from megarlhf.cli.errors import RunError, all_or_errors, machine_checks, running
from megarlhf.cli.local_ranks import run_program
from megarlhf.cli.memory import MemoryPlan
from megarlhf.cli.merge_lora import MergeArguments, MergeConfig
from megarlhf.cli.run import Opened, StopSignal, open_run_directory, resolve_kernels
from megarlhf.cli.run_select import select, select_file
from megarlhf.cli.run_supervised import check_models, resolved
from megarlhf.config.command_line import config_of, to_dict, to_yaml
from megarlhf.config.loop_arguments import IterateConfig, PostProcessor, SelectArguments, SelectConfig
from megarlhf.config.loop_stages import (
    evaluate_config,
    generate_config,
    round_directory,
    score_config,
    train_config,
)
from megarlhf.data.loading import load_rows
from megarlhf.data.selection import rewards_of
from megarlhf.formats.stages import Stages
from megarlhf.formats.staging import replace_link
from megarlhf.metrics.report import write_report
from megarlhf.metrics.sinks import METRICS_FILE, Sinks, read_rows
from megarlhf.parallel.device import device_kind
from megarlhf.trainers.evaluation import greedy_metrics

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_POST_PROCESSORS: dict[str, PostProcessor] = {
    "rejection_sampling": "rs",
    "iterative_dpo": "iter_dpo",
    "conditional_sft": "csft",
}
_FREE = (  # what may change between two starts of a loop, as no weight depends on it
    "num_rounds save_interval log_interval max_ckpt_num max_ckpt_mem use_tensorboard use_wandb wandb_project "
    "wandb_run_name wandb_org wandb_group host_memory_gib"
).split() + run_score.FREE


class Stopped(Exception):
    """A signal has ended the loop between two stages or inside one."""


def run(config: IterateConfig, *, dry_run: bool) -> int:
    """Check all stages, then run what is not finished yet; returns the exit status."""
    config = replace(config, reward=config.reward.resolved())
    said = _check_stages(config, dry_run=dry_run)
    if dry_run:
        print(f"{to_yaml(config)}\n{said}")
        return 0
    save, rounds = Path(config.logging.save), config.iterate.num_rounds
    if not (save / "stages.jsonl").exists() and (save / METRICS_FILE).exists():
        raise ValueError(f"save={save} holds another run: choose another directory")
    save.mkdir(parents=True, exist_ok=True)
    stages = Stages(save, {name: value for name, value in to_dict(config).items() if name not in _FREE})
    open_run_directory(str(save), to_yaml(config))
    print(said)
    logged = [row["step"] for row in read_rows(save / METRICS_FILE)]
    sinks = Sinks(
        save,
        total_steps=rounds,
        use_tensorboard=config.logging.use_tensorboard,
        use_wandb=config.logging.use_wandb,
        project=config.logging.wandb_project,
        run_name=config.logging.wandb_run_name,
        entity=config.logging.wandb_org,
        group=config.logging.wandb_group,
        config=to_dict(config),
        resumed_step=logged[-1] if logged else None,
        console=Console(force_terminal=False),  # the stages draw their own progress
    )
    loop = Loop(config, stages, StopSignal())
    try:
        with running():
            model = config.model.pretrain
            for number in range(rounds + 1):
                model = loop.round(number, model) if number else model
                loop.evaluate(number, model)
                if not logged or number > logged[-1]:
                    sinks.log(number, loop.metrics(number))
            replace_link(save / "hf", Path(model))
    except Stopped:
        print("stopped: the same command goes on with this stage")
        return 0
    finally:
        sinks.close()
    page, picture = write_report(save, f"megarlhf iterate: {save.name}")
    print(f"{table(read_rows(save / METRICS_FILE))}\nmodel: {save / 'hf'} ({model})\nreport: {page} and {picture}")
    return 0


def _check_stages(config: IterateConfig, *, dry_run: bool) -> str:
    """Read what all stages read, as far as it is there before the first; what is decided, in lines.

    Raises:
        ConfigError: what is wrong with any of it.
    """
    model, iterate = config.model.pretrain, config.iterate
    training = resolved(train_config(config, 1, model, dataset=config.data.prompt_data))
    scoring = score_config(config, config.data.prompt_data, str(round_directory(config, 1) / "scored.jsonl"))

    def check_training() -> tuple[list[Opened], MemoryPlan]:
        shared, layouts = training.share_prompt_prefix, [("", training.layout)]
        impl = resolve_kernels(training, layouts, share_prompt_prefix=shared, device=device_kind())
        return check_models(training, impl)

    def check_sources() -> str:
        with run_score.checked_sources(scoring, dry_run=dry_run) as (_, judges):
            return "" if judges is None else f"\n\nreward models:\n{judges.text()}"

    evaluations = [] if config.data.eval_data is None else [evaluate_config(config, 0, model)]
    compares = scoring.reward.reward_rule in ("math", "exact_match")
    load = partial(run_generate.load, needs_label=compares)
    (models, memory), judges, *loaded = all_or_errors(
        [
            check_training,
            check_sources,
            *[partial(load, each) for each in (generate_config(config, 1, model), *evaluations)],
        ]
    )
    most = iterate.rollout_batch_size * (iterate.n_samples_per_prompt if iterate.method == "conditional_sft" else 1)
    steps = config.batch.train_iters or max(1, most * config.batch.max_epochs // config.batch.global_batch_size)
    with machine_checks(dry_run=dry_run):
        check_disk_space(training, models[:1], first_step=0, last_step=steps)
        others = (iterate.num_rounds - 1 + bool(config.lora.lora_rank)) * stored_bytes(models[0].weights)
        if problems := space_problems({Path(config.logging.save).absolute(): (others, "the other rounds' models")}):
            raise ValueError(f"save={config.logging.save}; {'; '.join(problems)}")
    held_out = f", {len(loaded[1].prompts)} to evaluate on" if evaluations else ""
    return (
        f"{iterate.num_rounds} rounds of {len(loaded[0].prompts)} prompts x {iterate.n_samples_per_prompt} samples"
        f"{held_out}; training in a round: at most {steps} optimizer steps\n\n{memory.text()}{judges}"
    )


class Loop:
    """The stages of a loop's rounds; one that is finished is not run again."""

    def __init__(self, config: IterateConfig, stages: Stages, stop: StopSignal) -> None:
        self._config, self._stages, self._stop = config, stages, stop

    def round(self, number: int, model: str) -> str:
        """Generate, score, select and train; returns the directory of the model after the round."""
        config, directory = self._config, round_directory(self._config, number)
        samples, scored, selected = (directory / f"{name}.jsonl" for name in ("samples", "scored", "selected"))
        self._program(number, "generate", generate_config(config, number, model))
        self._program(number, "score", score_config(config, str(samples), str(scored)))
        self._stage(number, "select", lambda: print(select_file(self._selection(number))))
        if selected.stat().st_size == 0:
            print(f"round {number}: nothing is selected, and its model is the one before")
            return model
        training = train_config(config, number, model, dataset=str(selected))
        self._program(number, "train", training, program=f"train_{training.program}")
        shutil.rmtree(directory / "train" / "checkpoints", ignore_errors=True)  # they have done their work
        trained = str(directory / "train" / "hf")
        if not config.lora.lora_rank:
            return trained
        merged = str(directory / "merged")
        merge = MergeArguments(model_path=model, lora_path=trained, output_path=merged)
        self._program(number, "merge", MergeConfig(merge=merge), program="merge_lora")
        return merged

    def _selection(self, number: int) -> SelectArguments:
        directory = round_directory(self._config, number)
        return config_of(
            SelectConfig,
            self._config,
            dataset=str(directory / "scored.jsonl"),
            output=str(directory / "selected.jsonl"),
            post_processor=_POST_PROCESSORS[self._config.iterate.method],
        ).select

    def evaluate(self, number: int, model: str) -> None:
        """Greedy responses of the model after a round to the evaluation's prompts, and their rewards."""
        if self._config.data.eval_data is None:
            return
        directory = round_directory(self._config, number)
        samples, scored = (str(directory / f"eval_{name}.jsonl") for name in ("samples", "scored"))
        self._program(number, "eval_generate", evaluate_config(self._config, number, model), program="generate")
        self._program(number, "eval_score", score_config(self._config, samples, scored), program="score")

    def _program(self, number: int, stage: str, config: "DataclassInstance", *, program: str | None = None) -> None:
        """Run a program of this folder with a configuration, which is written beside its files."""
        path = round_directory(self._config, number) / f"{stage}.yaml"

        def start() -> None:
            path.write_text(to_yaml(config))
            status = run_program(
                f"megarlhf.cli.{program or stage}", ["--config", str(path)], should_stop=self._stop
            )
            if status and not self._stop():
                raise RunError(f"{path.parent.name}: {stage} ended with status {status}; see above")

        self._stage(number, stage, start)

    def _stage(self, number: int, stage: str, work: Callable[[], None]) -> None:
        directory = round_directory(self._config, number)
        name = f"{directory.name}/{stage}"
        if name in self._stages.seconds:
            return
        if self._stop():
            raise Stopped
        print(f"== {name}", flush=True)
        directory.mkdir(exist_ok=True)
        started = time.monotonic()
        work()
        if self._stop():  # the stage may have ended before its work was done
            raise Stopped
        self._stages.finish(name, time.monotonic() - started)

    def metrics(self, number: int) -> dict[str, float]:
        """Of a finished round, from its files."""
        directory = round_directory(self._config, number)
        found: dict[str, float] = {}
        if self._config.data.eval_data is not None:
            rows = load_rows(str(directory / "eval_scored.jsonl"), columns=("reward", "parts")).rows
            rewards = [row["reward"] for row in rows]
            own = greedy_metrics(rewards, [row["parts"] for row in rows], self._config.reward)
            found = {f"eval/{key}": value for key, value in own.items()}
            found["eval/no_result_count"] = float(rewards.count(None))
        if number:
            found |= _sample_metrics(load_rows(str(directory / "scored.jsonl")).rows)
            for row in read_rows(directory / "train" / METRICS_FILE)[-1:]:  # none where nothing was selected
                found |= {key: value for key, value in row.items() if "/eval_" in key}
            selection = select(self._selection(number))
            found |= {
                "select/rows": float(len(selection.rows)),
                "select/ties": float(selection.num_ties),
                "select/no_result_count": float(selection.num_empty),
            }
        names = {"generate": "rollout", "score": "reward", "train": "train", "eval_generate": "eval"}
        seconds = {stage: self._stages.seconds.get(f"{directory.name}/{stage}") for stage in names}
        return found | {f"time/{names[stage]}_seconds": value for stage, value in seconds.items() if value is not None}


def _sample_metrics(rows: list[Any]) -> dict[str, float]:
    """Of a round's scored samples."""
    rewards = rewards_of(rows)
    known = rewards[~np.isnan(rewards)]
    found = {
        "reward/no_result_count": float(sum(row["reward"] is None for row in rows)),
        "rollout/truncated_frac": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }
    return found | ({"reward/mean": float(known.mean()), "reward/std": float(known.std())} if len(known) else {})


def table(rows: list[dict[str, Any]]) -> str:
    """What a person asks of each round, in aligned columns; round 0 is the model before the first."""
    columns = {
        "round": ("step", "{:d}"),
        "reward": ("reward/mean", "{:.4f}"),
        "selected": ("select/rows", "{:.0f}"),
        "ties": ("select/ties", "{:.0f}"),
        "eval reward": ("eval/reward_mean", "{:.4f}"),
        "eval accuracy": ("eval/accuracy", "{:.1%}"),
    }
    shown = [list(columns)]
    for row in rows:
        shown.append(["" if row.get(key) is None else form.format(row[key]) for key, form in columns.values()])
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in shown)
