"""The run of a supervised program, whose configuration is checked already: load, then train as one rank or start them.

Data is read and tokenized once on a machine, into files that all its ranks map.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megarlhf.cli.disk import check_disk_space
from megarlhf.cli.errors import all_or_errors, machine_checks, running
from megarlhf.cli.local_ranks import INPUTS, RENDEZVOUS, prepared_once, run_local_ranks
from megarlhf.cli.memory import MemoryPlan, fitting_memory
from megarlhf.cli.run import (
    Opened,
    StopSignal,
    check_weights,
    data_identity,
    kernel_lines,
    model_identity,
    open_run_directory,
    open_sinks,
    resolve_kernels,
    resolved_files,
    resumed_step,
)
from megarlhf.cli.supervised_data import load_data
from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.supervised_arguments import SupervisedConfig
from megarlhf.data.supervised import SupervisedData, dropped_line
from megarlhf.metrics.report import write_report
from megarlhf.parallel.device import device_kind, num_cores


def run(config: SupervisedConfig, arguments: list[str], *, dry_run: bool) -> int:
    """Train as one rank, or start the local ranks with the same arguments; returns the exit status."""
    world = config.ranks.num_gpus_per_node
    threads = max(1, num_cores() // world)
    if dry_run:
        _, told = _load_inputs(config, dry_run=True)
        print(to_yaml(config) + "\n" + resolved_files(config.model, config.data) + "\n")
        print(f"{world} local rank(s), {threads} CPU thread(s) each\n{told['decided']}")
        return 0
    if "WORLD_SIZE" in os.environ:  # a rank: torchrun's, or one of those started below
        rendezvous = os.environ.get(RENDEZVOUS, "env://")
        minutes = config.layout.distributed_timeout_minutes
        with prepared_once(partial(_prepare, config), timeout_minutes=minutes) as directory:
            return _run_rank(config, directory, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), rendezvous)
    with TemporaryDirectory(prefix="megarlhf-") as name:
        directory = Path(name)
        _prepare(config, directory)
        if world == 1:
            return _run_rank(config, directory, 0, 1, f"file://{directory / 'ranks'}")
        return run_local_ranks(
            f"megarlhf.cli.train_{config.program}",
            arguments,
            world_size=world,
            threads=threads,
            environment={INPUTS: name},
        )


def _load_inputs(config: SupervisedConfig, *, dry_run: bool = False) -> tuple[list[SupervisedData], dict[str, Any]]:
    """Training data and, if there is any, evaluation data; and what else a rank is told before it starts.

    That is, decided: what computes the layers, and bytes by phase, for the start log; identity: what a checkpoint must
    agree with; continued: step of the checkpoint to continue from, or None.

    Raises:
        ConfigError: what is wrong with each of them.
    """
    device = device_kind()
    impl = resolve_kernels(config, {"": config.layout}, share_prompt_prefix=config.share_prompt_prefix, device=device)
    identity = model_identity(config.model.pretrain, config.layout) | {"seed": config.model.seed}
    paths = [config.data.dataset, *([config.data.eval_dataset] if config.data.eval_dataset else [])]
    steps: list[Callable[[], Any]] = [partial(load_data, config, path) for path in paths]

    def check_model() -> tuple[list[Opened], MemoryPlan]:
        models = check_weights([("pretrain", config.model.pretrain, config.layout, config.head)], transformer_impl=impl)
        return models, fitting_memory(config, [models[0].config])

    continued, (models, memory), data, *evaluation = all_or_errors(
        [partial(resumed_step, config.logging, identity), check_model, *steps]
    )
    identity |= {"data": data_identity(len(data.rows), data.fingerprint)}
    resumed_step(config.logging, identity)  # again, now that the data is known
    with machine_checks(dry_run=dry_run):
        check_disk_space(config, models, first_step=continued or 0, last_step=_total_steps(config, data))
    decided = f"{kernel_lines(config.kernels, [models[0].config], device=device)}\n\n{memory.text()}"
    return [data, *evaluation], {"decided": decided, "identity": identity, "continued": continued}


def _prepare(config: SupervisedConfig, directory: Path) -> None:
    """Load what a run reads, check it, and write it where the ranks find it.

    Raises:
        ConfigError: what is wrong with it.
        OSError: no room for it.
    """
    loaded, told = _load_inputs(config)
    try:
        for data, name in zip(loaded, ("training", "evaluation"), strict=False):
            data.save(directory / name)
    except OSError as error:
        error.add_note(f"tokenized data is written to {directory}, once on each machine: set TMPDIR to where it fits")
        raise
    (directory / "inputs.json").write_text(json.dumps(told))


def _total_steps(config: SupervisedConfig, data: SupervisedData) -> int:
    batch = config.batch
    return batch.train_iters or max(1, math.floor(data.rows.num_units * batch.max_epochs / batch.global_batch_size))


def _run_rank(config: SupervisedConfig, inputs: Path, rank: int, world_size: int, init_method: str) -> int:
    told = json.loads((inputs / "inputs.json").read_text())
    identity, data = told["identity"], SupervisedData.open(inputs / "training")
    evaluation = SupervisedData.open(inputs / "evaluation") if config.data.eval_dataset else None
    layout, total = config.layout, _total_steps(config, data)

    from megarlhf.data.planning import PackingOptions
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.engine.export import export_hf
    from megarlhf.parallel.groups import destroy_groups, initialize_groups
    from megarlhf.trainers import supervised
    from megarlhf.trainers.assembly import chat_template, model_options, optimizer_options, parallel_sizes
    from megarlhf.trainers.tasks import build_task

    stop, template = StopSignal(), chat_template(config)
    initialize_groups(
        parallel_sizes(layout),
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        seed=config.model.seed,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        timeout_minutes=layout.distributed_timeout_minutes,
    )
    engine = MegatronEngine(
        config.model.pretrain,
        head=config.head,
        model=model_options(layout, config),
        packing=PackingOptions(max_tokens=config.micro_batch_tokens, share_prefix=config.share_prompt_prefix),
        optimizer=optimizer_options(
            config.optimizer, layout, config.optimizer.learning_rate, total, passed=config.passed.megatron
        ),
        logprob_chunk_tokens=config.batch.logprob_chunk_tokens,
        seed=config.model.seed,
    )
    task = build_task(config, engine)
    directory, progress, sinks = Path(config.logging.save), supervised.Progress(), None
    if config.logging.load is not None:
        progress = supervised.load(engine, config.logging, identity=identity)
    if rank == 0:
        print(told["decided"])
        open_run_directory(config.logging.save, to_yaml(config))
        sinks = open_sinks(config.logging, to_dict(config), total_steps=total, resumed_step=told["continued"])
    try:
        with running():
            supervised.train(
                config,
                engine,
                task,
                data,
                evaluation,
                sinks,
                stop,
                progress=progress,
                total_steps=total,
                identity=identity,
            )
            export_hf(engine, directory / "hf", tokenizer=config.model.tokenizer, chat_template=template)
    finally:
        if sinks is not None:
            sinks.close()
        destroy_groups()
    if rank == 0:
        with running():
            page, picture = write_report(directory, f"megarlhf {config.program}: {directory.name}")
        print(f"{dropped_line(data)}\nmodel: {directory / 'hf'}\nreport: {page} and {picture}")
    return 0
