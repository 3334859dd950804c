"""What an option is set to, and where a run shows it: the parts of the table that programs share."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.config.in_process import Trace

Options = dict[str, Any]
Seen = Callable[[Trace], Any]
SAME = object()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One option: with `value` a run shows `expected` where `seen` looks, and without it something else."""

    value: Any
    seen: Seen
    expected: Any = SAME  # SAME: the value itself
    also: Options = field(default_factory=dict)  # other options of both runs
    before: Options = field(default_factory=dict)  # of the run without it, where it needs something else


def both(*seen: Seen) -> Seen:
    """All places at once."""
    return lambda trace: tuple([look(trace) for look in seen])


def given(what: str, name: str) -> Seen:
    """An argument of the first call of a constructor or function."""
    return lambda trace: trace.given[what][0][name]


def transformer(name: str, role: str = "actor") -> Seen:
    """A field of Megatron-Core's TransformerConfig."""
    return lambda trace: getattr(trace.engine(role).config, name)


def adam(name: str, role: str = "actor") -> Seen:
    """A field of Megatron-Core's OptimizerConfig."""
    return lambda trace: getattr(trace.engine(role).optimizer.config, name)


def ddp(name: str, role: str = "actor") -> Seen:
    """A field of Megatron-Core's DistributedDataParallelConfig."""
    return lambda trace: getattr(trace.engine(role).model[0].ddp, name)


def world(name: str, role: str = "actor") -> Seen:
    """What torch.distributed and Megatron-Core's parallel state were set up with."""
    return lambda trace: trace.world(role)[name]


def rates(role: str = "actor") -> Seen:
    """Learning rates of all optimizer steps, relative to the largest that is asked for."""
    return lambda trace: [
        round(rate / trace.engine(role).optimizer.config.lr, 6) for rate in trace.engine(role).optimizer.rates
    ]


def metric(name: str, step: int) -> Seen:
    """A metric of a step, None where it was not logged."""
    return lambda trace: next((row for row in trace.given["metrics"] if row["step"] == step), {}).get(name)


def steps_with(name: str) -> Seen:
    """Steps that logged a metric."""
    return lambda trace: [row["step"] for row in trace.given["metrics"] if name in row]


def refused(*words: str) -> Seen:
    """Whether the check of the configuration says so."""
    return lambda trace: trace.error.startswith("ConfigError") and all(word in trace.error for word in words)


def linked(trace: Trace) -> tuple[bool, list[str]]:
    """Whether the run's checkpoints are a link to another directory, and what is there."""
    place = Path(trace.given["directory"][0]) / "checkpoints"
    target = place.resolve()
    return place.is_symlink() and target.name.startswith("checkpoints_"), [p.name for p in target.glob("iter_*")]


def best_probes(metric: str) -> dict[str, Probe]:
    """Options of the best checkpoint, by a metric that differs from evaluation to evaluation."""

    def best(trace: Trace) -> tuple[list[str], bool, bool]:
        """What a run exports, and whether the best checkpoint is the largest's, or the smallest's."""
        place = Path(trace.given["directory"][0]) / "checkpoints/best/run_state.json"
        state = json.loads(place.read_text() if place.exists() else "{}")
        values = {row["step"]: row[metric] for row in trace.given["metrics"] if row["step"] and metric in row}
        kept, exported = values[state["step"]], [each["directory"].name for each in trace.given["export"]]
        return exported, kept == max(values.values()), kept == min(values.values())

    exported, also = ["hf", "hf_best"], {"eval_interval": 1, "train_iters": 5}
    return {
        "best_metric": Probe(value=metric, seen=best, expected=(exported, True, False), also=also),
        "best_metric_mode": Probe(
            value="min", seen=best, expected=(exported, False, True), also=also | {"best_metric": metric}
        ),
    }


def layout_probes(role: str, ranks: Callable[[int], Options]) -> dict[str, Probe]:
    """Options of a layout.

    Args:
        role: whose engine is looked at.
        ranks: the options that ask for so many ranks.
    """
    pipeline = {"pipeline_model_parallel_size": 2} | ranks(2)
    tensor = {"tensor_model_parallel_size": 2} | ranks(2)
    experts = {"pretrain": "{}/experts"} | ranks(2)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

    def config(name: str) -> Seen:
        return transformer(name, role)

    return {
        "tensor_model_parallel_size": Probe(
            value=2,
            seen=both(world("tensor", role), config("tensor_model_parallel_size")),
            **{"expected": (2, 2), "also": ranks(2)},
        ),
        "pipeline_model_parallel_size": Probe(
            value=2,
            seen=both(world("pipeline", role), config("pipeline_model_parallel_size")),
            **{"expected": (2, 2), "also": ranks(2)},
        ),
        "num_virtual_stages_per_pipeline_rank": Probe(
            value=2,
            seen=both(
                world("virtual_pipeline_model_parallel_size", role),
                config("virtual_pipeline_model_parallel_size"),
                lambda trace: len(trace.engine(role).chunks),
            ),
            **{"expected": (2, 2, 2), "also": pipeline},
        ),
        "decoder_first_pipeline_num_layers": Probe(
            value=1, seen=config("num_layers_in_first_pipeline_stage"), also=pipeline
        ),
        "decoder_last_pipeline_num_layers": Probe(
            value=1, seen=config("num_layers_in_last_pipeline_stage"), also=pipeline
        ),
        "context_parallel_size": Probe(
            value=2,
            seen=both(world("context_parallel_size", role), config("context_parallel_size")),
            **{"expected": (2, 2), "also": ranks(2)},
        ),
        "cp_comm_type": Probe(
            value="all_gather", seen=config("cp_comm_type"), also={"context_parallel_size": 2} | ranks(2)
        ),
        "expert_model_parallel_size": Probe(
            value=2,
            seen=both(world("expert_model_parallel_size", role), config("expert_model_parallel_size")),
            **{"expected": (2, 2), "also": experts},
        ),
        "expert_tensor_parallel_size": Probe(
            value=1,
            seen=both(world("expert_tensor_parallel_size", role), config("expert_tensor_parallel_size")),
            expected=(1, 1),
            also=experts | tensor | {"expert_model_parallel_size": 2, "sequence_parallel": True} | ranks(4),
        ),
        "sequence_parallel": Probe(
            value=True,
            seen=both(config("sequence_parallel"), lambda trace: trace.engine(role)._pad),
            **{"expected": (True, 2), "also": tensor},
        ),
        "use_distributed_optimizer": Probe(
            value=False,
            seen=both(adam("use_distributed_optimizer", role), ddp("use_distributed_optimizer", role)),
            expected=(False, False),
        ),
        "overlap_grad_reduce": Probe(value=True, seen=ddp("overlap_grad_reduce", role)),
        "overlap_param_gather": Probe(
            value=True,
            seen=both(
                adam("overlap_param_gather", role),
                ddp("overlap_param_gather", role),
                lambda trace: trace.engine(role)._gathers_late,
            ),
            **{"expected": (True, True, True), "also": {"overlap_grad_reduce": True}},
        ),
        "recompute_granularity": Probe(
            value="selective",
            seen=both(config("recompute_granularity"), config("recompute_modules")),
            expected=("selective", ["core_attn"]),
        ),
        "recompute_method": Probe(value="block", seen=config("recompute_method"), also=full, before=full),
        "recompute_num_layers": Probe(value=2, seen=config("recompute_num_layers"), also=full, before=full),
        "distributed_timeout_minutes": Probe(
            value=7.0,
            seen=both(world("timeout", role), world("distributed_timeout_minutes", role)),
            expected=(timedelta(minutes=7), 7),
        ),
    }


def optimizer_probes(role: str) -> dict[str, Probe]:
    """Options of AdamW and its schedule. Runs of a role have as many steps that a warm-up of a half shows."""
    constant = {"lr_decay_style": "constant", "lr_warmup_ratio": 0.0}

    def number_of_steps(trace: Trace) -> int:
        return len(trace.engine(role).optimizer.rates)

    return {
        "lr_warmup_ratio": Probe(
            value=1.0,
            seen=lambda trace: round(rates(role)(trace)[0] * (number_of_steps(trace) - 1), 4),
            **{"expected": 1.0, "also": {"lr_decay_style": "constant"}},
        ),
        "min_lr_ratio": Probe(value=0.37, seen=lambda trace: rates(role)(trace)[-1], also={"lr_warmup_ratio": 0.0}),
        "lr_decay_style": Probe(
            value="constant",
            seen=lambda trace: set(rates(role)(trace)),
            **{"expected": {1.0}, "also": {"lr_warmup_ratio": 0.0}},
        ),
        "adam_beta1": Probe(value=0.71, seen=adam("adam_beta1", role)),
        "adam_beta2": Probe(value=0.72, seen=adam("adam_beta2", role)),
        "adam_eps": Probe(value=7e-3, seen=adam("adam_eps", role)),
        "weight_decay": Probe(
            value=0.073,
            seen=both(
                adam("weight_decay", role),
                lambda trace: trace.engine(role).optimizer.param_groups[0]["weight_decay"],
            ),
            **{"expected": (0.073, 0.073), "also": constant},
        ),
        "clip_grad": Probe(value=0.74, seen=adam("clip_grad", role)),
        "optimizer_cpu_offload": Probe(
            value=True,
            seen=both(adam("optimizer_cpu_offload", role), adam("use_precision_aware_optimizer", role)),
            **{"expected": (True, True)},
        ),
        "optimizer_offload_fraction": Probe(
            value=0.3, seen=adam("optimizer_offload_fraction", role), also={"optimizer_cpu_offload": True}
        ),
        "overlap_cpu_optimizer_d2h_h2d": Probe(
            value=True, seen=adam("overlap_cpu_optimizer_d2h_h2d", role), also={"optimizer_cpu_offload": True}
        ),
    }


def own_layout_probes(
    role: str, option_of_experts: str, *, several: bool = False, beside: bool = True, **also: Any
) -> dict[str, Probe]:
    """Options of a role's own layout, each with the actor's beside it, which stays as it is.

    Args:
        option_of_experts: names the role's checkpoint, with experts where they are split.
        several: options take a value for each of several models.
        beside: there is an actor.
        also: what else a run needs that has the role.
    """
    ranks = also | {f"{role}_num_gpus_per_node": 2}

    def given(name: str, value: Any) -> Options:
        return {f"{role}_{name}": (value,) if several else value}

    pipeline, tensor = (ranks | given(f"{kind}_model_parallel_size", 2) for kind in ("pipeline", "tensor"))
    experts = ranks | {option_of_experts: "{}/experts" if option_of_experts == "pretrain" else "{}/rm_experts"}

    def sizes(name: str) -> Seen:
        return both(transformer(name, role), transformer(name, "actor") if beside else lambda trace: None)

    virtual, first, last = (
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
    moe = tensor | experts | given("sequence_parallel", True)
    table: tuple[tuple[str, Any, str, Any, Options], ...] = (
        ("tensor_model_parallel_size", 2, "tensor_model_parallel_size", 1, ranks),
        ("pipeline_model_parallel_size", 2, "pipeline_model_parallel_size", 1, ranks),
        ("num_virtual_stages_per_pipeline_rank", 2, virtual, None, pipeline),
        ("decoder_first_pipeline_num_layers", 1, first, None, pipeline),
        ("decoder_last_pipeline_num_layers", 1, last, None, pipeline),
        ("context_parallel_size", 2, "context_parallel_size", 1, ranks),
        ("expert_model_parallel_size", 2, "expert_model_parallel_size", 1, experts),
        ("sequence_parallel", True, "sequence_parallel", False, tensor),
    )
    probes = {
        f"{role}_{option}": Probe(
            value=(value,) if several else value,
            seen=sizes(name),
            expected=(value, actors if beside else None),
            also=options,
        )
        for option, value, name, actors, options in table
    }
    probes[f"{role}_expert_tensor_parallel_size"] = Probe(
        value=(1,) if several else 1,
        seen=sizes("expert_tensor_parallel_size"),
        **{"expected": (1, 1 if beside else None), "also": moe | given("expert_model_parallel_size", 2)},
    )
    return probes


def kernel_probes(role: str) -> dict[str, Probe]:
    """Options of what layers are computed with. On a CPU they reach the model and are said; nothing is fused there."""

    def switched_off(flag: str) -> Probe:
        said = f": off (--no-{flag.replace('_', '-')})"
        return Probe(
            value=False,
            seen=both(lambda trace: getattr(trace.engine(role).config.kernels, flag), lambda trace: said in trace.said),
            expected=(False, True),
        )

    flags = ("rope_fusion", "gradient_accumulation_fusion", "bias_swiglu_fusion", "bias_dropout_fusion")
    impl = "transformer_impl=transformer_engine; it computes on GPUs alone"
    return {
        "transformer_impl": Probe(
            value="transformer_engine", seen=lambda trace: impl in trace.error, **{"expected": True}
        ),
        **{flag: switched_off(flag) for flag in flags},
    }


def megatron_probe(role: str) -> dict[str, Probe]:
    """Options passed on to Megatron-Core: one of each of its two dataclasses, and an enumeration's member."""
    backend = transformer("attention_backend", role)
    return {
        "megatron": Probe(
            value=(("attention_backend", "flash"), ("moe_per_layer_logging", True), ("log_num_zeros_in_grad", True)),
            seen=both(
                lambda trace: backend(trace).name,
                transformer("moe_per_layer_logging", role),
                adam("log_num_zeros_in_grad", role),
            ),
            expected=("flash", True, True),
        )
    }


def adapter(name: str) -> Seen:
    """An option of the actor's adapters; None where there are none."""
    return lambda trace: getattr(getattr(trace.engine().adapters, "options", None), name, None)


LORA = {
    "lora_rank": Probe(value=5, seen=adapter("lora_rank")),
    "lora_alpha": Probe(value=9, seen=adapter("lora_alpha"), also={"lora_rank": 2}),
    "lora_dropout": Probe(value=0.25, seen=adapter("lora_dropout"), also={"lora_rank": 2}),
    "target_modules": Probe(value=("q_proj", "up_proj"), seen=adapter("target_modules"), **{"also": {"lora_rank": 2}}),
    "load_in_4bit": Probe(value=True, seen=adapter("load_in_4bit"), also={"lora_rank": 2}),
}
