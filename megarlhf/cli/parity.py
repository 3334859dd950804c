"""Does a layout give the one-process result for a model? `megarlhf parity --pretrain DIR --context-parallel-size 2 ...`

Runs the model in one process, then in the layout, on the same random sequences, and prints the largest differences.
Exit status 1 where one is past its tolerance.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megarlhf.cli.local_ranks import MEETING, run_local_ranks
from megarlhf.cli.run import report_errors
from megarlhf.config.arguments import OptimizerArguments, ParityConfig
from megarlhf.config.checks import check_parity, raise_if
from megarlhf.config.command_line import parse, to_yaml
from megarlhf.config.layouts import LayoutArguments
from megarlhf.parallel.device import num_cores

_DIRECTORY = "MEGARLHF_PARITY"  # environment variable: where the reference's results lie, once it has run
_COMPLETE = "complete"  # file there
_LEARNING_RATE = 1e-4
# Tokens: nats, or units of value. Loss, gradients and their norm: relative to the reference's largest, if above 1.
# Step: in weights, where Adam makes a whole learning rate of a gradient that is nothing but rounding.
_TOLERANCES = {
    "forward": 2e-4,
    "training": 2e-4,
    "loss": 1e-5,
    "metrics": 2e-4,
    "gradients": 1e-4,
    "grad norm": 1e-4,
    "step": 2 * _LEARNING_RATE,
    "after": 2e-3,
}
_BF16_FACTOR = 500.0  # bfloat16 keeps 8 bits of a number, float32 24; the errors of a whole model add up


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and check; start the ranks, or compute as one of them; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, dry_run = parse(ParityConfig, arguments, prog="megarlhf parity")
    return report_errors("megarlhf parity", lambda: _run(config, arguments, dry_run=dry_run))


def _run(config: ParityConfig, arguments: list[str], *, dry_run: bool) -> int:
    raise_if(check_parity(config))
    if dry_run:
        print(to_yaml(config))
        return 0
    if _DIRECTORY in os.environ:
        return _run_rank(config, Path(os.environ[_DIRECTORY]))
    with TemporaryDirectory(prefix="megarlhf-parity-") as directory:
        os.environ[_DIRECTORY] = directory
        for world_size in (1, config.parity.num_gpus_per_node):
            threads = max(1, num_cores() // world_size)
            status = run_local_ranks("megarlhf.cli.parity", arguments, world_size=world_size, threads=threads)
            if status:
                return status
    return 0


def _run_rank(config: ParityConfig, directory: Path) -> int:
    """One rank of the reference, where that has not run yet, or of the layout."""
    from megarlhf.engine.engine import MegatronEngine, PackingOptions
    from megarlhf.parallel.groups import destroy_groups, initialize_groups
    from megarlhf.trainers import parity
    from megarlhf.trainers.assembly import model_options, optimizer_options, parallel_sizes

    rank, options = int(os.environ["RANK"]), config.parity
    is_reference = not (directory / _COMPLETE).exists()
    layout = LayoutArguments(use_distributed_optimizer=False) if is_reference else config.layout
    passed = True
    for name in options.objectives:
        initialize_groups(
            parallel_sizes(layout),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            init_method=f"{os.environ[MEETING]}-{name}",
            seed=config.model.seed,
            local_rank=int(os.environ["LOCAL_RANK"]),
            timeout_minutes=layout.distributed_timeout_minutes,
        )
        engine = MegatronEngine(
            config.model.pretrain,
            head="value" if name == "critic" else "lm",
            model=model_options(layout, config.model),
            packing=PackingOptions(
                max_tokens=options.max_tokens_per_micro_batch,
                share_prefix=options.share_prompt_prefix and not is_reference,
            ),
            optimizer=optimizer_options(
                OptimizerArguments(lr_warmup_ratio=0.0, lr_decay_style="constant"), layout, _LEARNING_RATE, 10
            ),
            temperature=0.7,
            seed=config.model.seed,
        )
        rows = parity.parity_rows(
            engine.hf.vocab_size, groups=options.num_groups, longest=options.longest, seed=config.model.seed
        )
        if is_reference:
            parity.write_reference(engine, name, rows, directory / name)
        else:
            differences = parity.compare(engine, name, rows, directory / name)
            if rank == 0:
                passed &= _report(config, name, differences, parity.scales(directory / name))
        destroy_groups()
        del engine
    if is_reference:
        (directory / _COMPLETE).touch()
    return 0 if passed else 1


def _report(config: ParityConfig, name: str, differences: dict[str, float], scales: dict[str, float]) -> bool:
    """Print one objective's differences beside what is allowed; returns whether all are within."""
    factor = config.parity.tolerance * (_BF16_FACTOR if config.model.bf16 else 1.0)
    print(
        f"\n{name}: largest gradient {scales['gradients']:.2g}, the step moves results by up to {scales['moved']:.2g}"
    )
    within = True
    for quantity, difference in differences.items():
        allowed = _TOLERANCES[quantity] * factor * max(1.0, abs(scales.get(quantity, 1.0)))
        verdict = "ok" if difference <= allowed else "PAST ITS TOLERANCE"
        within &= difference <= allowed
        print(f"  {quantity:10} {difference:8.1e}  (at most {allowed:.1e})  {verdict}", flush=True)
    return within


if __name__ == "__main__":
    sys.exit(main())
