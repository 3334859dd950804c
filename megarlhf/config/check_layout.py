"""A parallel layout against itself, a model's config.json, the number of ranks and the batch.

Every function returns sentences for the user and raises nothing; a value that is out of its own range is passed over,
as check_numbers reports it. `prefix` is that of a role's options, "critic_", where its own layout is meant.
"""

import math
from collections.abc import Mapping
from typing import Any

from megarlhf.config.arguments import PPOConfig, SharedOptimizerArguments
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.roles import ROLES, RoleSpec, first_given, megatron_roles, reward_roles, unread_counts
from megarlhf.config.supervised_arguments import DPOConfig, SupervisedConfig

Model = Mapping[str, Any]  # content of a config.json


def size(model: Model, key: str, default: int | None = None) -> int | None:
    """A positive size from a config.json, None where it is unknown."""
    value = model.get(key) or default
    return value if isinstance(value, int) and value > 0 else None


def num_experts(model: Model) -> int | None:
    """Routed experts of a layer; None for a dense model."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((found for key in keys if (found := size(model, key)) is not None), None)


def one_of(numbers: list[int]) -> str:
    """The numbers as text: "1, 2 or 4"."""
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


def broken(rules: Mapping[str, object]) -> list[str]:
    """The sentences of a table, sentence -> whether it is so, that are so."""
    return [sentence for sentence, is_so in rules.items() if is_so]


def layout_errors(layout: LayoutArguments, models: Mapping[str, Model], prefix: str = "") -> list[str]:
    """A layout that contradicts itself, or does not fit one of the models (option that names it -> config.json)."""
    tp, pp = f"{prefix}tensor_model_parallel_size", f"{prefix}pipeline_model_parallel_size"
    virtual = layout.virtual_stages
    errors = broken(
        {
            f"{prefix}sequence_parallel=True needs {tp} above 1 (activations are split over those ranks): set {tp}, or "
            "leave sequence_parallel out": layout.sequence_parallel and layout.tensor_model_parallel_size <= 1,
            f"{prefix}num_virtual_stages_per_pipeline_rank={virtual} needs {pp} above 1 (stages of several ranks are "
            f"interleaved): set {pp}, or leave it out": virtual != 1 and layout.pipeline_model_parallel_size <= 1,
        }
    )
    for owner, model in models.items():
        errors += _head_errors(layout, owner, model, prefix)
        errors += _stage_errors(layout, owner, model, prefix)
        errors += _expert_errors(layout, owner, model, prefix)
    return errors


def shared_errors(layout: LayoutArguments) -> list[str]:
    """What all roles have in common: recomputation and overlap."""
    distributed, overlap = layout.use_distributed_optimizer, layout.overlap_grad_reduce
    granularity, rules = layout.recompute_granularity, dict[str, bool]()
    for name in ("recompute_method", "recompute_num_layers"):
        value = getattr(layout, name)
        rules |= {
            f"{name}=None with recompute_granularity=full (it says which layers are recomputed): set {name}": (
                granularity == "full" and value is None
            ),
            f"{name}={value} is ignored with recompute_granularity={granularity}: set it to full, or leave {name} "
            "out": granularity != "full" and value is not None,
        }
    rules[
        f"overlap_param_gather=True needs use_distributed_optimizer={distributed} and overlap_grad_reduce={overlap} to "
        "be on (it hides their communication): set both"
    ] = layout.overlap_param_gather and not (distributed and overlap)
    return broken(rules)


def offload_errors(optimizer: SharedOptimizerArguments, layout: LayoutArguments) -> list[str]:
    """An optimizer on the host that the layout has no parts for, and options of one that is not there."""
    names = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")
    unread = {name: getattr(optimizer, name) for name in names if not optimizer.optimizer_cpu_offload}
    errors = [
        f"{name}={value} is ignored without optimizer_cpu_offload: set it, or leave {name} out"
        for name, value in unread.items()
        if value != getattr(SharedOptimizerArguments, name)
    ]
    said = "optimizer_cpu_offload=True needs use_distributed_optimizer=False to be on (Megatron-Core steps nothing "
    return errors + broken(
        {f"{said}there otherwise): set it": optimizer.optimizer_cpu_offload and not layout.use_distributed_optimizer}
    )


def resident_errors(config: PPOConfig | SupervisedConfig) -> list[str]:
    """Models that are to stay on the device where there are none."""
    if isinstance(config, PPOConfig):
        option, judges = "ref_reward_offload", bool(reward_roles(config)) and config.cluster.colocate_all_models
        kept = any(role.keeps_reference(config) for role in megatron_roles(config))
    else:
        option, judges, kept = "ref_offload", False, config.keeps_reference
        kept &= not (isinstance(config, DPOConfig) and config.dpo.precompute_ref_log_probs)
    has_any = judges or (kept and not config.lora.lora_rank)
    said = f"{option}=False is ignored (no reference has weights of its own, and no reward model shares devices)"
    return broken({f"{said}: leave it out": config.keeps_resident and not has_any})


def role_errors(config: PPOConfig, models: Mapping[str, Model]) -> list[str]:
    """The layout of every role against its model (option -> config.json), and options of roles that the run has not."""
    errors: list[str] = []
    for role in megatron_roles(config):
        layout, (owner, _) = role.layout(config), role.start(config)
        prefix = role.prefix if layout != config.layout else ""
        errors += layout_errors(layout, {owner: models[owner]}, prefix)
    errors += [
        f"{option}={value} is ignored {_why_absent(role, config)}: leave it out"
        for role in ROLES.values()
        if not role.is_in(config)
        for option, value in role.own_options(config).items()
        if option not in unread_counts(config)
    ]
    return list(dict.fromkeys(errors))


def _why_absent(role: RoleSpec, config: PPOConfig) -> str:
    """Why a run lacks a role."""
    if role.estimators is None:
        return f"without {role.checkpoint[0]} (there is no {role.name} model)"
    estimator, others = config.algorithm.advantage_estimator, " or ".join(role.estimators)
    return f"with advantage_estimator={estimator} (only {others} has a {role.name})"


def _head_errors(layout: LayoutArguments, owner: str, model: Model, prefix: str) -> list[str]:
    """Heads and matrices over tensor-parallel ranks."""
    heads = size(model, "num_attention_heads")
    all_experts = num_experts(model) is not None and size(model, "moe_intermediate_size") is None
    widths = {
        "num_attention_heads": heads,
        "num_key_value_heads": size(model, "num_key_value_heads", heads),
        "intermediate_size": None if all_experts else size(model, "intermediate_size"),
    }
    name, value = f"{prefix}tensor_model_parallel_size", layout.tensor_model_parallel_size
    return _divisor_errors(name, value, widths, f"{owner} (heads and matrices are split over TP)")


def _stage_errors(layout: LayoutArguments, owner: str, model: Model, prefix: str) -> list[str]:
    """Layers over pipeline stages and their interleaved chunks."""
    layers, pp, virtual = size(model, "num_hidden_layers"), layout.pipeline_model_parallel_size, layout.virtual_stages
    if layers is None or pp < 1 or virtual < 1:
        return []
    if layout.decoder_first_pipeline_num_layers or layout.decoder_last_pipeline_num_layers:
        return _uneven_stage_errors(layout, layers, owner, prefix)
    if layers % (pp * virtual) == 0:
        return _recompute_depth_errors(layout, layers // (pp * virtual), owner)
    option = f"{prefix}pipeline_model_parallel_size"
    if virtual == 1:
        rule = f"stages are of equal depth, unless {prefix}decoder_first_pipeline_num_layers or ..._last_... is set"
        return _divisor_errors(option, pp, {"num_hidden_layers": layers}, f"{owner} ({rule})")
    return [
        f"{option}={pp} x {prefix}num_virtual_stages_per_pipeline_rank={virtual} does not divide "
        f"num_hidden_layers={layers} of {owner} (chunks are of equal depth): change one of them"
    ]


def _uneven_stage_errors(layout: LayoutArguments, layers: int, owner: str, prefix: str) -> list[str]:
    pp, virtual = layout.pipeline_model_parallel_size, layout.virtual_stages
    ends = {
        f"{prefix}decoder_first_pipeline_num_layers": layout.decoder_first_pipeline_num_layers,
        f"{prefix}decoder_last_pipeline_num_layers": layout.decoder_last_pipeline_num_layers,
    }
    given = {name: value for name, value in ends.items() if value is not None}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    option = f"{prefix}pipeline_model_parallel_size"
    if pp == 1:
        return [f"{shown} has no effect with {option}=1 (it has all layers): leave it out"]
    rest, stages = layers - sum(given.values()), pp - len(given)
    if (stages == 0 and rest) or (stages and (rest < stages or rest % stages)):
        return [
            f"{shown} leaves {rest} of num_hidden_layers={layers} of {owner} to the {stages} other stages of "
            f"{option}={pp} (those are of equal depth, at least 1): change one of them"
        ]
    depths = [*given.values(), *([rest // stages] if stages else [])]
    if any(depth % virtual for depth in depths):
        return [
            f"{prefix}num_virtual_stages_per_pipeline_rank={virtual} does not divide the stages' depths {depths} that "
            f"{shown} makes of num_hidden_layers={layers}: change one of them"
        ]
    return _recompute_depth_errors(layout, min(depths) // virtual, owner)


def _recompute_depth_errors(layout: LayoutArguments, depth: int, owner: str) -> list[str]:
    number = layout.recompute_num_layers or 0
    said = (
        f"recompute_num_layers={number} is above the {depth} layers of a stage's chunk ({owner}): use at most {depth}"
    )
    return [said] if number > depth else []


def _expert_errors(layout: LayoutArguments, owner: str, model: Model, prefix: str) -> list[str]:
    """Experts over expert-parallel ranks, their matrices over expert-tensor-parallel ranks."""
    experts, ep, etp = num_experts(model), layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    tp, name = layout.tensor_model_parallel_size, f"{prefix}expert_tensor_parallel_size"
    given = {"expert_model_parallel_size": ep if ep > 1 else None, "expert_tensor_parallel_size": etp}
    if experts is None:
        return [
            f"{prefix}{option}={value} has nothing to split: {owner} has no experts: leave it out"
            for option, value in given.items()
            if value is not None and model
        ]
    dealt = f"{prefix}expert_model_parallel_size"
    errors = _divisor_errors(dealt, ep, {"experts": experts}, f"{owner} (each rank has as many)")
    width = size(model, "moe_intermediate_size") or size(model, "intermediate_size")
    errors += _divisor_errors(name, etp or tp, {"width of an expert": width}, f"{owner} (matrices are split over it)")
    return errors + broken(
        {
            f"{name}={etp} differs from {prefix}tensor_model_parallel_size={tp} with {dealt}=1 (Megatron-Core 0.16 "
            "then sums the experts' gradients over the wrong ranks): leave it out, or deal the experts to more ranks": (
                ep == 1 and etp not in (None, tp)
            ),
            f"{prefix}tensor_model_parallel_size={tp} needs sequence_parallel with the experts of {owner} "
            "(Megatron-Core routes each token on one rank): set sequence_parallel": (
                tp > 1 and not layout.sequence_parallel
            ),
        }
    )


def _divisor_errors(option: str, value: int, sizes: Mapping[str, int | None], owner: str) -> list[str]:
    """The option's value must divide all sizes; unknown ones are passed over."""
    known = {key: number for key, number in sizes.items() if number is not None}
    if value < 1 or not known:
        return []
    valid = [n for n in range(1, min(known.values()) + 1) if all(number % n == 0 for number in known.values())]
    return [
        f"{option}={value} does not divide {key}={number} of {owner}: use {one_of(valid)}"
        for key, number in known.items()
        if number % value
    ]


def world_errors(
    name: str, world_size: int, layout: LayoutArguments, global_batch_size: int, prefix: str = ""
) -> list[str]:
    """One model's ranks against its layout and the batch; `name` has the options and values that make their number."""
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size or tp
    if min(world_size, tp, pp, cp, ep, etp, global_batch_size) < 1:
        return []
    whole = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
    split = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp, "pipeline_model_parallel_size": pp}
    for sizes, copy in ((whole, "model"), (split, "experts")):
        product = math.prod(sizes.values())
        if world_size % product:  # where the model does not fit, the experts do not matter
            return [
                f"{name} makes {world_size} ranks, no multiple of {' * '.join(prefix + key for key in sizes)} = "
                f"{product} (ranks of one copy of the {copy}): use {product}, {2 * product}, ... ranks"
            ]
    replicas = world_size // (tp * pp * cp)
    if global_batch_size >= replicas:
        return []
    return [
        f"global_batch_size={global_batch_size} is below the {replicas} data-parallel ranks that {name} makes (each "
        f"needs a sample): use at least {replicas}"
    ]


def cluster_errors(config: PPOConfig) -> list[str]:
    """Ranks of every role, and where Ray is."""
    errors = broken(
        {
            f"ray_address={config.cluster.ray_address} is ignored with ray=False (--no_ray, or `python -m "
            "megarlhf.cli.train_ppo`, which starts processes on this machine): leave it out, or set --ray": (
                config.cluster.ray is False and config.cluster.ray_address is not None
            )
        }
    )
    checked = []
    for role in megatron_roles(config):
        layout, world_size = role.layout(config), role.num_workers(config)
        prefix, tp = role.prefix if layout != config.layout else "", layout.tensor_model_parallel_size
        nodes, number = (first_given(config.cluster, names) for names in role.workers)
        if nodes[1] > 1 and config.cluster.ray is False:
            errors.append(f"{nodes[0]}={nodes[1]} needs Ray (ray=False starts processes on this machine alone): use 1")
        elif nodes[1] > 1 and tp > 0 and number[1] % tp:
            errors.append(
                f"{number[0]}={number[1]} is no multiple of {prefix}tensor_model_parallel_size={tp} (with "
                f"{nodes[0]}={nodes[1]}; tensor-parallel ranks share a node): use {tp}, {2 * tp}, ..."
            )
        if (layout, world_size) not in checked:
            checked.append((layout, world_size))
            name = f"{role.workers[0][0]}={nodes[1]} x {role.workers[1][0]}={number[1]}"
            samples = config.batch.global_batch_size if role.trains else world_size  # a frozen rank may have none
            errors += world_errors(name, world_size, layout, samples, prefix)
    return list(dict.fromkeys(errors))
