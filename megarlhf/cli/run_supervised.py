"""The run of a supervised program, whose configuration is checked already: load, then train as one rank or start them.

Data is read and tokenized once on a machine, into files that all its ranks map.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megarlhf.cli.disk import check_disk_space
from megarlhf.cli.errors import all_or_errors, machine_checks, running
from megarlhf.cli.local_ranks import INPUTS, RENDEZVOUS, prepared_once, run_local_ranks
from megarlhf.cli.memory import MemoryPlan, fitting_memory
from megarlhf.cli.run import (
    Opened,
    StopSignal,
    check_best_metric,
    check_loaded_files,
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
from megarlhf.cli.supervised_data import data_loaders, data_text, open_data
from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.layouts import TransformerImpl
from megarlhf.config.precision import precision_lines
from megarlhf.config.reward_model_arguments import PRMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, PairsConfig, SupervisedConfig
from megarlhf.data.supervised import SupervisedData, Units, dropped_line
from megarlhf.formats.huggingface import HFWeights
from megarlhf.metrics.keys import METRICS
from megarlhf.metrics.report import write_report
from megarlhf.models.backend import resolve_transformer_impl
from megarlhf.parallel.device import device_kind, num_cores
from megarlhf.parallel.network import use_interface_towards

if TYPE_CHECKING:
    from megarlhf.engine.average import WeightAverage
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.trainers.supervised import Progress, SupervisedTask


def run(config: SupervisedConfig, arguments: list[str], *, dry_run: bool) -> int:
    """Train as one rank, or start the local ranks with the same arguments; returns the exit status."""
    config = resolved(config)
    world = config.ranks.num_gpus_per_node
    threads = max(1, num_cores() // world)
    if dry_run:
        _, told = _load_inputs(config, dry_run=True)
        print(to_yaml(config) + "\n" + resolved_files(config.model, config.data) + "\n")
        print(f"{world} local rank(s), {threads} CPU thread(s) each\n{told['decided']}")
        return 0
    if "WORLD_SIZE" in os.environ:  # a rank: torchrun's, or one of those started below
        rendezvous, world_size = os.environ.get(RENDEZVOUS, "env://"), os.environ["WORLD_SIZE"]
        first, on_this_node = os.environ.get("MASTER_ADDR"), os.environ.get("LOCAL_WORLD_SIZE", world_size)
        if RENDEZVOUS not in os.environ and first is not None and on_this_node != world_size:
            use_interface_towards(first)
        minutes = config.layout.distributed_timeout_minutes
        with prepared_once(partial(_prepare, config), timeout_minutes=minutes) as directory:
            return _run_rank(config, directory, int(os.environ["RANK"]), int(world_size), rendezvous)
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


def resolved(config: SupervisedConfig) -> SupervisedConfig:
    """The configuration with what was left open: the answers to a prompt share its computation where layers can."""
    if not isinstance(config, PairsConfig) or config.batch.share_prompt_prefix is not None:
        return config
    impl = resolve_transformer_impl(config.kernels.transformer_impl, device=device_kind())
    share = impl == "local" and config.layout.context_parallel_size == 1
    return replace(config, batch=replace(config.batch, share_prompt_prefix=share))


def _load_inputs(config: SupervisedConfig, *, dry_run: bool = False) -> tuple[list[Units], dict[str, Any]]:
    """Training data and, if there is any, evaluation data; and what else a rank is told before it starts.

    That is, decided: what computes the layers, and bytes by phase, for the start log; identity: what a checkpoint must
    agree with; continued: step of the checkpoint to continue from, or None.

    Raises:
        ConfigError: what is wrong with each of them.
    """
    device = device_kind()
    impl = resolve_kernels(config, [("", config.layout)], share_prompt_prefix=config.share_prompt_prefix, device=device)
    identity = model_identity(config.model.pretrain, config.layout, lora=config.lora) | {"seed": config.model.seed}
    loaders: list[Callable[[], Any]] = [*data_loaders(config)]

    reported = [key for key in METRICS if key.startswith(f"{config.program}/eval_")]
    continued, _, _, (models, memory), data, *evaluation = all_or_errors(
        [
            partial(resumed_step, config.logging, identity),
            partial(check_loaded_files, config.logging),
            partial(check_best_metric, config.logging, reported),
            partial(check_models, config, impl),
            *loaders,
        ]
    )
    identity |= {"data": data_identity(len(data), data.fingerprint)} | _objective_identity(config)
    resumed_step(config.logging, identity)  # again, now that the data and other models can be read
    total, batch = _total_steps(config, data), config.batch
    with machine_checks(dry_run=dry_run):
        check_disk_space(config, models[:1], first_step=continued or 0, last_step=total)
    steps = f"{total} optimizer steps, {total * batch.global_batch_size / data.num_units:.3g} epochs"
    steps += "" if batch.train_iters is None else f" (train_iters; max_epochs={batch.max_epochs} does not count)"
    told = f"{data_text(data, evaluation[0] if evaluation else None)}\n{steps}"
    kernels = kernel_lines(config.kernels, [model.config for model in models], device=device)
    phases = precision_lines(config.precision, bf16=config.model.bf16, roles=["the model"])
    decided = "\n".join([told, *phases, f"\n{kernels}\n", memory.text()])
    return [data, *evaluation], {"decided": decided, "identity": identity, "continued": continued}


def check_models(config: SupervisedConfig, impl: TransformerImpl) -> tuple[list[Opened], MemoryPlan]:
    """The trained model, its reference and the others that only compute, opened, and what they take on the devices.

    Raises:
        ConfigError: what is wrong with each of them, or that they do not fit.
    """
    own = ("pretrain", config.model.pretrain, config.layout, config.head)
    others = [(option, place, config.layout, "lm") for option, place in config.other_models.items()]
    reference = [] if config.ref_pretrain is None else [("ref_pretrain", config.ref_pretrain, config.layout, "lm")]
    adapted, alone = all_or_errors(
        [
            partial(check_weights, [own, *reference], transformer_impl=impl, lora=config.lora),
            partial(check_weights, others, transformer_impl=impl),
        ]
    )
    models = [adapted[0], *alone]
    return models, fitting_memory(config, [model.config for model in models])


def _objective_identity(config: SupervisedConfig) -> dict[str, Any]:
    """What a checkpoint and a configuration must agree on beyond the model: the loss, and whom it compares with.

    And an average of the weights, which would be dropped, or is not there.
    """
    shared = {group.name for group in fields(SupervisedConfig)}
    groups = [asdict(getattr(config, group.name)) for group in fields(config) if group.name not in shared]
    own = {name: value for group in groups for name, value in group.items()}
    for name in ("precompute_ref_log_probs", "ref_offload"):  # the same numbers
        own.pop(name, None)
    own["enable_ema"] = config.optimizer.enable_ema or None  # as in checkpoints from before there were averages
    if isinstance(config, PRMConfig):
        own["reward_tokens"] = config.data.reward_tokens and list(config.data.reward_tokens)
    models = dict(config.other_models)
    if isinstance(config, DPOConfig | KTOConfig):
        own.pop("ref_pretrain", None)
        models["ref_pretrain or pretrain"] = config.ref_pretrain or config.model.pretrain
    return own | {option: HFWeights(Path(directory)).fingerprint() for option, directory in models.items()}


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


def _total_steps(config: SupervisedConfig, data: Units) -> int:
    batch = config.batch
    return batch.train_iters or max(1, math.floor(data.num_units * batch.max_epochs / batch.global_batch_size))


def _run_rank(config: SupervisedConfig, inputs: Path, rank: int, world_size: int, init_method: str) -> int:
    told = json.loads((inputs / "inputs.json").read_text())
    identity, data = told["identity"], open_data(config, inputs / "training")
    evaluation = open_data(config, inputs / "evaluation") if config.data.evaluates else None
    layout, total = config.layout, _total_steps(config, data)

    from megarlhf.data.planning import PackingOptions
    from megarlhf.engine.average import WeightAverage
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.engine.export import export_hf
    from megarlhf.parallel.groups import destroy_groups, initialize_groups
    from megarlhf.trainers import supervised
    from megarlhf.trainers.assembly import chat_template, model_options, optimizer_options, parallel_sizes
    from megarlhf.trainers.tasks import build_task

    stop, template = StopSignal(), chat_template(config)  # read before hours of training
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
    sets = [data, *([] if evaluation is None else [evaluation])]
    if task.complete is not None:
        sets = [*task.complete([each for each in sets if isinstance(each, SupervisedData)])]
    data, *held_out = sets
    progress, sinks = supervised.Progress(), None
    average = WeightAverage(engine, config.optimizer.ema_decay) if config.optimizer.enable_ema else None
    if config.logging.load is not None:
        progress = supervised.load(engine, config.logging, identity=identity, average=average)
    if rank == 0:
        print(told["decided"])
        open_run_directory(config.logging.save, to_yaml(config), ckpt_path=config.logging.ckpt_path)
        sinks = open_sinks(config.logging, to_dict(config), total_steps=total, resumed_step=told["continued"])
    try:
        with running():
            ended = supervised.train(
                config,
                engine,
                task,
                data,
                held_out[0] if held_out else None,
                sinks,
                stop,
                progress=progress,
                total_steps=total,
                identity=identity,
                average=average,
            )
            export = partial(export_hf, engine, tokenizer=config.model.tokenizer, chat_template=template)
            best = _export_all(export, config, engine, task, ended, held_out, average)
    finally:
        if sinks is not None:
            sinks.close()
        destroy_groups()
    if rank == 0:
        measured = "evaluation data" if evaluation else f"first {supervised.MEASURED_UNITS} units of training data"
        _report(config, data, {name: f"{value:.4g} of the {measured}" for name, value in ended.config_entries.items()})
        if best is not None:
            print(f"best: {ended.best}, {Path(config.logging.save) / 'hf_best'}")
    return 0


def _export_all(
    export: Callable[..., None],
    config: SupervisedConfig,
    engine: "MegatronEngine",
    task: "SupervisedTask",
    ended: "Progress",
    held_out: Sequence[Units],
    average: "WeightAverage | None",
) -> Path | None:
    """The model, its average and the best one, all ranks together; returns the checkpoint of the last, if there is one.

    The engine has the last exported weights then.
    """
    from megarlhf.engine.checkpoint import load_engine
    from megarlhf.trainers import supervised

    directory, best = Path(config.logging.save), ended.best.directory(config.logging)
    export(directory / "hf", config_entries=ended.config_entries)
    if average is not None:  # what was measured is not of these weights
        with average.in_place():
            export(directory / "hf_ema")
    if best is not None:
        load_engine(engine, best / "actor", with_optimizer=False)
        found = supervised.evaluate(engine, task, held_out[0], config.batch.global_batch_size)
        export(directory / "hf_best", config_entries=task.config_entries(found) if task.config_entries else {})
    return best


def _report(config: SupervisedConfig, data: Units, entries: Mapping[str, str]) -> None:
    """Draw the run, and say where everything is."""
    directory = Path(config.logging.save)
    with running():
        page, picture = write_report(directory, f"megarlhf {config.program}: {directory.name}")
    for name, text in entries.items():
        print(f"config.json: {name}={text}")
    print(f"{dropped_line(data)}\nmodel: {directory / 'hf'}\nreport: {page} and {picture}")
