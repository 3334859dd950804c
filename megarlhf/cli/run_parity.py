"""The run of parity.py, whose configuration is checked already: the reference's rank, then the layout's, compared."""

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from megarlhf.cli.local_ranks import RENDEZVOUS, run_local_ranks
from megarlhf.cli.run import check_weights, kernel_lines, resolve_kernels
from megarlhf.config.arguments import OptimizerArguments
from megarlhf.config.command_line import to_yaml
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.supervised_arguments import ParityConfig
from megarlhf.data.planning import PackingOptions
from megarlhf.engine.engine import MegatronEngine
from megarlhf.parallel.device import device_kind, num_cores
from megarlhf.parallel.groups import destroy_groups, initialize_groups
from megarlhf.trainers import parity
from megarlhf.trainers.assembly import model_options, optimizer_options, parallel_sizes
from megarlhf.trainers.parity_cases import parity_case, parity_rows

_DIRECTORY = "MEGARLHF_PARITY"  # environment variable: where the results of the runs lie
_PHASE = "MEGARLHF_PARITY_PHASE"  # environment variable: "reference", "bf16" (one process) or "layout"
_NOISE = "bf16.json"  # file in an objective's folder there: how far one process in bfloat16 is off
_LEARNING_RATE = 1e-4
_ADAM_EPS = 1e-3  # large: with the usual one Adam makes a whole learning rate of a gradient that is only rounding
# Tokens: nats, or units of value. Loss and gradient norm: relative, if the reference's is above 1. Gradients: relative
# to the model's largest; by tensor: to the tensor's. Step: in weights. Movement: relative.
_TOLERANCES = {
    "forward": 2e-4,
    "training": 2e-4,
    "loss": 1e-5,
    "metrics": 2e-4,
    "gradients": 1e-4,
    "by tensor": 2e-3,
    "grad norm": 1e-4,
    "step": 0.1 * _LEARNING_RATE,
    "movement": 5e-3,
    "after": 2e-3,
}
_MEANS = {"loss", "metrics"}
_BF16_FACTOR = 3.0  # how many times one process's distance in bfloat16 a layout's may be
_MOST_MOVEMENT = 0.5  # whatever bfloat16 allows: no step at all is off by 1, a step the wrong way by 2


def run(config: ParityConfig, arguments: list[str], *, dry_run: bool) -> int:
    """Start the ranks with the same arguments, or compute as one of them; returns the exit status."""
    if _DIRECTORY in os.environ:
        return _run_rank(config, Path(os.environ[_DIRECTORY]))
    device, shared = device_kind(), config.parity.share_prompt_prefix
    impl = resolve_kernels(config, [("", config.layout)], share_prompt_prefix=shared, device=device)
    (model,) = check_weights([("pretrain", config.model.pretrain, config.layout, "lm")], transformer_impl=impl)
    print(kernel_lines(config.kernels, [model.config], device=device), flush=True)
    if dry_run:
        print(to_yaml(config) + f"\n{config.world_size} rank(s) of the layout, beside one process")
        return 0
    with TemporaryDirectory(prefix="megarlhf-parity-") as directory:
        os.environ[_DIRECTORY] = directory
        phases = {"reference": 1} | ({"bf16": 1} if config.model.bf16 else {}) | {"layout": config.world_size}
        for os.environ[_PHASE], world_size in phases.items():
            threads = max(1, num_cores() // world_size)
            if status := run_local_ranks(
                "megarlhf.cli.parity", arguments, world_size=world_size, threads=threads, environment={}
            ):
                return status
    return 0


def _run_rank(config: ParityConfig, directory: Path) -> int:
    """One rank of the reference, of one process in bfloat16, or of the layout."""
    rank, options = int(os.environ["RANK"]), config.parity
    phase = os.environ[_PHASE]
    layout = config.layout if phase == "layout" else LayoutArguments(use_distributed_optimizer=False)
    model = replace(config.model, bf16=config.model.bf16 and phase != "reference")
    share = options.share_prompt_prefix and phase == "layout"
    constant = OptimizerArguments(lr_warmup_ratio=0.0, lr_decay_style="constant", adam_eps=_ADAM_EPS)
    passed = True
    for name in options.objectives:
        initialize_groups(
            parallel_sizes(layout),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            init_method=f"{os.environ[RENDEZVOUS]}-{name}",
            seed=config.model.seed,
            local_rank=int(os.environ["LOCAL_RANK"]),
            timeout_minutes=layout.distributed_timeout_minutes,
        )
        engine = MegatronEngine(
            config.model.pretrain,
            head=parity_case(name).head,
            model=model_options(layout, replace(config, model=model)),
            packing=PackingOptions(max_tokens=options.max_tokens_per_micro_batch, share_prefix=share),
            optimizer=optimizer_options(constant, layout, _LEARNING_RATE, 10, passed=config.passed.megatron),
            logprob_chunk_tokens=options.max_tokens_per_micro_batch,
            temperature=0.7,
            seed=config.model.seed,
        )
        rows = parity_rows(
            engine.hf.vocab_size, groups=options.num_groups, longest=options.longest, seed=config.model.seed
        )
        if phase == "reference":
            parity.write_reference(engine, name, rows, directory / name)
        else:
            differences = parity.compare(engine, name, rows, directory / name)
            if phase == "bf16":
                (directory / name / _NOISE).write_text(json.dumps(differences))
            elif rank == 0:
                passed &= _report(config, name, differences, directory / name)
        destroy_groups()
        del engine
    return 0 if passed else 1


def _report(config: ParityConfig, name: str, differences: dict[str, float], reference: Path) -> bool:
    """Print one objective's differences beside what is allowed; returns whether all are within."""
    scales = parity.scales(reference)
    noise = json.loads((reference / _NOISE).read_text()) if config.model.bf16 else {}
    for mean in _MEANS & noise.keys():  # its errors may cancel in one process and not in the layout
        noise[mean] = max(noise[mean], 0.1 * noise["training"])
    units = {"loss": max(1.0, abs(scales["loss"])), "grad norm": max(1.0, scales["grad norm"])}
    units["gradients"] = scales["gradients"]
    print(
        f"\n{name}: largest gradient {scales['gradients']:.2g}, the step moves results by up to {scales['moved']:.2g}"
    )
    within = True
    for quantity, difference in differences.items():
        allowed = _TOLERANCES[quantity] * units.get(quantity, 1.0) + _BF16_FACTOR * noise.get(quantity, 0.0)
        allowed *= config.parity.tolerance
        if quantity == "movement":
            allowed = min(allowed, _MOST_MOVEMENT)
        verdict = "ok" if difference <= allowed else "PAST ITS TOLERANCE"
        within &= difference <= allowed
        print(f"  {quantity:10} {difference:8.1e}  (at most {allowed:.1e})  {verdict}", flush=True)
    return within
