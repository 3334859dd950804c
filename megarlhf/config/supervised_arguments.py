"""Options of supervised training and of `megarlhf parity`; arguments.py has the groups that they share with RL."""

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from megarlhf.config.arguments import LoggingArguments, ModelArguments, RenderingArguments, SharedOptimizerArguments
from megarlhf.config.layouts import KernelArguments, LayoutArguments
from megarlhf.config.passed import MegatronPassedArguments


@dataclass(frozen=True, kw_only=True)
class RankArguments:
    """Where supervised training runs."""

    num_gpus_per_node: int = 1
    """Ranks started on this machine: one GPU each, or one process each. Under torchrun its number of ranks wins."""
    gpu_memory_gib: float | None = None
    """Memory of each GPU in GiB, which the plan's bytes must fit into. None: this machine's GPUs tell; without any, the
    plan is printed and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class SupervisedBatchArguments:
    """How much work a step is."""

    train_iters: int | None = None
    """Optimizer steps to run. None: as many as max_epochs makes."""
    max_epochs: int = 2
    """Passes over the data."""
    global_batch_size: int = 128
    """Sequences in an optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Sequences of full length in one forward and backward pass of a rank. Sequences are packed without padding."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens in one forward and backward pass of a rank. None: micro_batch_size * max_len."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits a rank holds at once, in fp32: fewer take less memory, and each chunk but a micro-batch's
    last is computed twice in training."""
    max_len: int = 2048
    """Longest sequence in tokens, prompt and response together."""


@dataclass(frozen=True, kw_only=True)
class SupervisedOptimizerArguments(SharedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 5e-6
    """Largest learning rate."""


@dataclass(frozen=True, kw_only=True)
class SupervisedDataArguments(RenderingArguments):
    """What to train on."""

    dataset: str
    """Training data: a .jsonl, .json, .csv or .parquet file, or a directory saved with datasets."""
    eval_dataset: str | None = None
    """Evaluation data, in the same formats. None: no evaluation."""


@dataclass(frozen=True, kw_only=True)
class SFTDataArguments(SupervisedDataArguments):
    """Conversations or prompt-response pairs to imitate."""

    input_key: str = "input"
    """Column with the prompt, or with the whole conversation where output_key is None."""
    output_key: str | None = None
    """Column with the response. None: input_key holds the whole conversation."""
    pretrain_mode: bool = False
    """Train on the prompt's tokens as well."""


@dataclass(frozen=True, kw_only=True)
class ParityArguments:
    """What is compared."""

    num_gpus_per_node: int | None = None
    """Ranks of the layout, all on this machine: one GPU each, or one process each. None: as few as the layout takes,
    TP * PP * CP, or the next multiple of it that EP * ETP * PP divides. Give twice as many to see data parallelism."""
    objectives: tuple[Literal["sft", "actor", "critic"], ...] = ("sft", "actor", "critic")
    """Losses to run: supervised, the PPO policy's, the critic's."""
    num_groups: int = 3
    """Prompts of random tokens; each has three responses."""
    longest: int = 48
    """Most tokens of a response."""
    max_tokens_per_micro_batch: int = 256
    """Tokens in one forward and backward pass of a rank."""
    share_prompt_prefix: bool = False
    """Compute each prompt once for its responses, in the layout under test. The reference never does."""
    tolerance: float = 1.0
    """Multiple of the built-in tolerances. With bf16 these grow by three times what one process in bf16 is off."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Compare a layout with one process: log-probs, loss, gradients, one optimizer step."""

    model: ModelArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    kernels: KernelArguments = field(default_factory=KernelArguments)
    parity: ParityArguments = field(default_factory=ParityArguments)
    passed: MegatronPassedArguments = field(default_factory=MegatronPassedArguments)

    @property
    def world_size(self) -> int:
        """Ranks of the layout: those asked for, or the fewest that hold whole models and whole sets of experts."""
        layout = self.layout
        tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        expert_tensor = layout.expert_tensor_parallel_size or tensor
        fewest = math.lcm(
            tensor * pipeline * layout.context_parallel_size,
            layout.expert_model_parallel_size * expert_tensor * pipeline,
        )
        return fewest if self.parity.num_gpus_per_node is None else self.parity.num_gpus_per_node


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """What all supervised programs have; each adds its data and its loss."""

    model: ModelArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    kernels: KernelArguments = field(default_factory=KernelArguments)
    ranks: RankArguments = field(default_factory=RankArguments)
    batch: SupervisedBatchArguments = field(default_factory=SupervisedBatchArguments)
    optimizer: SupervisedOptimizerArguments = field(default_factory=SupervisedOptimizerArguments)
    data: SupervisedDataArguments
    logging: LoggingArguments
    passed: MegatronPassedArguments = field(default_factory=MegatronPassedArguments)

    @property
    def program(self) -> str:
        """Name of the command, and of its metrics before the slash."""
        raise NotImplementedError

    @property
    def head(self) -> Literal["lm", "value"]:
        """What the trained model computes: vocabulary logits, or one value a token."""
        return "lm"

    @property
    def share_prompt_prefix(self) -> bool:
        """Whether rows of one unit share their prompt's computation."""
        return False

    @property
    def keeps_reference(self) -> bool:
        """Whether the start's weights stay beside those that are trained."""
        return False

    @property
    def world_size(self) -> int:
        """Ranks that train: torchrun's, or those that are started here."""
        started = os.environ.get("WORLD_SIZE", "")
        return int(started) if started.isdecimal() else self.ranks.num_gpus_per_node

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.batch.max_len

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens in one forward and backward pass of a rank."""
        return self.batch.max_tokens_per_micro_batch or self.batch.micro_batch_size * self.max_row_tokens


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning."""

    data: SFTDataArguments

    @property
    def program(self) -> str:
        """Name of the command, and of its metrics before the slash."""
        return "sft"
