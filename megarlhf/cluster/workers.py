"""What runs inside the worker processes: one Megatron rank of a role, or one inference engine."""

import faulthandler
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.shared_tensors import Block
from megarlhf.data.types import Prompt, Sample, TrainingRow


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Who a worker process is."""

    config: PPOConfig
    role: Literal["actor", "critic", "rollout"]
    rank: int
    world_size: int
    local_rank: int
    threads: int
    stop_token_ids: tuple[int, ...]
    share_prompt_prefix: bool
    log_file: str


def redirect_output(path: str) -> None:
    """Send this process's output, its libraries' included, to a file; what a crash leaves is read from there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)


class MegatronWorker:
    """One rank of the actor (with the reference beside it) or of the critic."""

    def __init__(self, spec: WorkerSpec) -> None:
        redirect_output(spec.log_file)
        import torch

        from megarlhf.cluster.serialization import register_tensors

        register_tensors()
        torch.set_num_threads(spec.threads)
        self.spec = spec

    def start(self, init_method: str) -> None:
        """Join the role's groups and load the model."""
        from megarlhf.parallel.device import freeze_garbage_collector
        from megarlhf.parallel.groups import initialize_groups
        from megarlhf.trainers.assembly import build_engine, build_objective, chat_template, parallel_sizes

        spec, layout = self.spec, self.spec.config.layout_of(self.spec.role)
        initialize_groups(
            parallel_sizes(layout),
            rank=spec.rank,
            world_size=spec.world_size,
            init_method=init_method,
            seed=spec.config.model.seed,
            local_rank=spec.local_rank,
            timeout_minutes=layout.distributed_timeout_minutes,
        )
        self.engine = build_engine(spec.config, spec.role, share_prompt_prefix=spec.share_prompt_prefix)
        if spec.role == "actor" and spec.config.algorithm.init_kl_coef > 0:
            self.engine.keep_reference()
        self.objective = build_objective(spec.config, spec.role)
        self._chat_template = chat_template(spec.config) if spec.rank == 0 else None
        freeze_garbage_collector()

    def log_probs(self, rows: Sequence[TrainingRow]) -> dict[int, Any]:
        """See MegatronEngine.log_probs."""
        return self.engine.log_probs(rows)

    def ref_log_probs(self, rows: Sequence[TrainingRow]) -> dict[int, Any]:
        """Log-probs under the reference model."""
        with self.engine.reference_weights():
            return self.engine.log_probs(rows)

    def values(self, rows: Sequence[TrainingRow]) -> dict[int, Any]:
        """See MegatronEngine.values."""
        return self.engine.values(rows)

    def update(self, rows: Sequence[TrainingRow], denominator: float) -> Any:
        """One optimizer step; a StepResult."""
        return self.engine.train_step(rows, self.objective, denominator=denominator)

    def share_weights(self) -> list[Block]:
        """Hold this rank's share of the weights in shared memory from now on; what lies where."""
        from megarlhf.engine.sharing import SharedWeights

        self._shared_weights = SharedWeights(self.engine)
        return self._shared_weights.blocks

    def refresh_shared_weights(self) -> list[bytes]:
        """After share_weights: the digests of this rank's blocks, which hold the present weights until it trains on."""
        return self._shared_weights.refresh()

    def export(self, directory: str) -> None:
        """Write the model as a Hugging Face checkpoint; every rank takes part."""
        from megarlhf.engine.export import export_hf

        export_hf(
            self.engine,
            Path(directory),
            tokenizer=self.spec.config.model.tokenizer,
            chat_template=self._chat_template,
        )

    def save(self, directory: str) -> None:
        """Write this role's checkpoint."""
        from megarlhf.engine.checkpoint import save_engine

        save_engine(self.engine, Path(directory))

    def load(self, directory: str) -> None:
        """Continue from this role's checkpoint."""
        from megarlhf.engine.checkpoint import load_engine

        load_engine(self.engine, Path(directory), with_optimizer=not self.spec.config.logging.no_load_optim)

    def sleep(self) -> None:
        """Give the device to other roles."""
        self.engine.sleep()

    def wake(self) -> None:
        """Take the device back."""
        self.engine.wake()


class RolloutWorker:
    """One vLLM engine."""

    def __init__(self, spec: WorkerSpec) -> None:
        redirect_output(spec.log_file)
        self.spec = spec

    def start(self) -> None:
        """Load the engine; its weights are replaced by the first sync."""
        from megarlhf.rollout.engine import RolloutEngine

        config, options = self.spec.config, self.spec.config.rollout
        self.engine = RolloutEngine(
            config.model.pretrain,
            dtype="bfloat16" if config.model.bf16 else "float32",
            seed=config.model.seed,
            max_model_len=options.prompt_max_len + options.generate_max_len,
            tensor_parallel_size=config.cluster.vllm_tensor_parallel_size,
            max_num_seqs=options.max_num_seqs,
            enforce_eager=options.enforce_eager,
            gpu_memory_utilization=options.vllm_gpu_memory_utilization,
            kv_cache_gib=options.vllm_kv_cache_gib,
            threads=self.spec.threads,
            tokenizer_dir=config.model.tokenizer,
            skip_special_tokens=config.reward.reward_skip_special_tokens is not False,
        )

    def generate(
        self, prompts: Sequence[Prompt], group_ids: Sequence[int], n_samples: int, step: int, greedy: bool
    ) -> list[Sample]:
        """Samples of each prompt, group by group."""
        config = self.spec.config
        return self.engine.generate(
            list(prompts),
            group_ids=list(group_ids),
            n_samples=n_samples,
            max_tokens=config.rollout.generate_max_len,
            temperature=config.rollout.temperature,
            stop_token_ids=list(self.spec.stop_token_ids),
            run_seed=config.model.seed,
            step=step,
            greedy=greedy,
        )

    def connect_weights(self, blocks: Sequence[Block]) -> None:
        """See RolloutEngine.connect_weights."""
        self.engine.connect_weights(blocks)

    def update_weights(self, version: int, checksum: str) -> dict[str, Any]:
        """See RolloutEngine.update_weights."""
        return self.engine.update_weights(version, checksum)

    def sleep(self) -> None:
        """Give the device to other roles."""
        self.engine.sleep()

    def wake(self) -> None:
        """Take the device back."""
        self.engine.wake()
