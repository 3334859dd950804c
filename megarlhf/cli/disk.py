"""Room for what a run will write, known before it starts: checkpoints and model on the disk, weights in memory."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarlhf.cli.run import Opened
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.lora import LoraArguments
from megarlhf.config.supervised_arguments import SupervisedConfig
from megarlhf.formats import shared_memory
from megarlhf.formats.huggingface import HFConfig, HFWeights
from megarlhf.models.names import model_maps, model_shapes
from megarlhf.models.registry import find_architecture
from megarlhf.models.targets import adapter_numbers

_GIB = 2**30


def checkpoint_bytes(num_parameters: int, *, bf16: bool, distributed: bool) -> int:
    """Bytes of one checkpoint: weights, AdamW's two moments, and main weights where the optimizer keeps its own.

    Args:
        num_parameters: of every model that is trained, whatever its layout.
        distributed: the distributed optimizer, which keeps main weights under fp32 too.
    """
    weights, moments = 2 if bf16 else 4, 8
    main = 4 if bf16 or distributed else 0
    return num_parameters * (weights + main + moments)


def num_checkpoints(*, first_step: int, last_step: int, intervals: Sequence[int], keep: int, present: int) -> int:
    """Checkpoints at a time beyond those that are there: the oldest goes after a newer one is complete.

    Args:
        first_step: last finished step, from which the run goes on.
        intervals: steps between saves, of each reason for one; the last step is saved in any case.
        keep: how many stay.
        present: complete ones in the run directory.
    """
    if first_step >= last_step:
        return 0
    saved = {last_step}.union(*(range(first_step // n * n + n, last_step + 1, n) for n in intervals))
    return max(1, min(len(saved) + present, keep + 1) - present)


def check_shared_memory(config: HFConfig, *, bf16: bool, object_store_bytes: int) -> None:
    """There must be room for the model's weights and a step's tokens; layouts with replicas may take more.

    Args:
        config: as read_checkpoint gives it.
    Raises:
        ValueError: these alone do not fit.
    """
    num_bytes = _num_parameters(config, "lm") * (2 if bf16 else 4)
    free = shared_memory.free_shared_memory()
    shared_memory.check_shared_memory(num_bytes, free, object_store_bytes=object_store_bytes)


def check_disk_space(
    config: PPOConfig | SupervisedConfig, models: Sequence[Opened], *, first_step: int, last_step: int
) -> None:
    """There must be room for the run's checkpoints and the exported model.

    Args:
        models: those that are trained; the first's weights are as large as the exported model's.
    Raises:
        ValueError: there is not; logs and metrics, which are small, are not counted.
    """
    logging, source = config.logging, models[0].weights
    save = Path(logging.save).absolute()
    trained = [_num_trained(model.config, model.head, config.lora) for model in models]
    distributed = config.layout.use_distributed_optimizer
    root = Path(logging.ckpt_path or save / "checkpoints").absolute()
    present = sum(path.is_dir() and path.suffix != ".partial" for path in root.glob("iter_*"))
    intervals, keep = [logging.save_interval or last_step], logging.max_ckpt_num
    if logging.best_metric is not None:  # every evaluation may be the best, whose checkpoint stays besides
        intervals, keep = [*intervals, logging.eval_interval or 1], keep + 1
    more = num_checkpoints(first_step=first_step, last_step=last_step, intervals=intervals, keep=keep, present=present)
    size = checkpoint_bytes(sum(trained), bf16=config.model.bf16, distributed=distributed)
    exported = 4 * trained[0] if config.lora.lora_rank else stored_bytes(source)
    averaged = config.optimizer.enable_ema
    size += 4 * trained[0] * averaged
    needs = {root: (more * size, f"{more} checkpoint(s)"), save / "hf": (exported, "the exported model")}
    needs |= {save / "hf_ema": (exported, "its average")} if averaged else {}
    needs |= {save / "hf_best": (exported, "the best model")} if logging.best_metric is not None else {}
    if isinstance(config, PPOConfig) and config.model.save_value_network:
        needs[save / "hf_critic"] = (stored_bytes(models[1].weights), "the exported critic")
    if problems := space_problems(needs):
        raise ValueError(f"save={logging.save}; {'; '.join(problems)}")


def stored_bytes(weights: HFWeights) -> int:
    """What the files of a model's weights take."""
    return sum((weights.directory / name).stat().st_size for name in weights.files)


def _num_trained(config: HFConfig, head: str, lora: LoraArguments) -> int:
    if not lora.lora_rank:
        return _num_parameters(config, head)
    arch = find_architecture(config)
    sizes, maps = arch.dimensions(config), model_maps(arch, config, head)
    return sum(sum(adapter_numbers(weight, lora, sizes)) for weight in maps) + sizes["hidden"] * (head == "value")


def _num_parameters(config: HFConfig, head: str) -> int:
    return sum(map(math.prod, model_shapes(find_architecture(config), config, head).values()))


def space_problems(needs: Mapping[Path, tuple[int, str]]) -> list[str]:
    """A sentence for each disk that lacks room for the bytes that come to places, which need not exist yet."""
    disks: dict[int, list[Path]] = {}
    for place in needs:
        disks.setdefault(os.stat(_existing(place)).st_dev, []).append(place)
    problems = []
    for places in disks.values():
        needed, free = sum(needs[place][0] for place in places), shutil.disk_usage(_existing(places[0])).free
        if needed > free:
            parts = " and ".join(f"{needs[place][0] / _GIB:.3g} GiB for {needs[place][1]}" for place in places)
            problems.append(
                f"the disk of {_existing(places[0])} has {free / _GIB:.3g} GiB free where the run needs "
                f"{needed / _GIB:.3g} GiB ({parts}): free space, lower max_ckpt_num, or save to another disk"
            )
    return problems


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())
