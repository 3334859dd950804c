"""Layouts under test, and engines built in them inside a rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megarlhf.engine.engine import MegatronEngine, PackingOptions
from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.models.build import ModelOptions
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut a model."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    share_prefix: bool = False
    max_tokens: int = 64
    bf16: bool = False
    recompute: str | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


SINGLE = Layout()
LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "DP2-distopt": Layout(data=2, distributed_optimizer=True),
    "DP2": Layout(data=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "TP2-SP-DP2-distopt": Layout(tensor=2, sequence_parallel=True, data=2, distributed_optimizer=True),
    "PP2-DP2-distopt": Layout(pipeline=2, data=2, distributed_optimizer=True),
    "large-micro-batch": Layout(max_tokens=512),
    "share-prefix": Layout(share_prefix=True, max_tokens=128),
    "share-prefix-TP2-SP": Layout(share_prefix=True, max_tokens=128, tensor=2, sequence_parallel=True),
    "share-prefix-PP2": Layout(share_prefix=True, max_tokens=128, pipeline=2),
    "recompute-full": Layout(recompute="full"),
}


@contextmanager
def world(layout: Layout, rank: int, init_method: str) -> Iterator[None]:
    """Join a world in this layout for the block."""
    sizes = ParallelSizes(tensor=layout.tensor, pipeline=layout.pipeline)
    initialize_groups(
        sizes, rank=rank, world_size=layout.world_size, init_method=init_method, seed=1, timeout_minutes=2
    )
    try:
        yield
    finally:
        destroy_groups()


def build(
    layout: Layout,
    model_dir: Path,
    *,
    head: str = "lm",
    optimizer: bool = True,
    total_steps: int = 20,
    temperature: float = 1.0,
) -> MegatronEngine:
    """An engine in the present world."""
    options = OptimizerOptions(
        learning_rate=1e-3,
        total_steps=total_steps,
        lr_warmup_ratio=0.0,
        lr_decay_style="constant",
        adam_eps=1e-4,  # large, so that a step is a smooth function of the gradient
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    return MegatronEngine(
        model_dir,
        head=head,
        model=ModelOptions(
            sequence_parallel=layout.sequence_parallel,
            bf16=layout.bf16,
            recompute_granularity=layout.recompute,
            recompute_method="uniform" if layout.recompute == "full" else None,
            recompute_num_layers=1 if layout.recompute == "full" else None,
        ),
        packing=PackingOptions(max_tokens=layout.max_tokens, share_prefix=layout.share_prefix),
        optimizer=options if optimizer else None,
        temperature=temperature,
    )
