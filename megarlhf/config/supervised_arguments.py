"""Options of supervised training and of `megarlhf parity`; arguments.py has the groups that they share with RL."""

import math
import os
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megarlhf.config.arguments import AveragedOptimizerArguments, LoggingArguments, ModelArguments, RenderingArguments
from megarlhf.config.layouts import KernelArguments, LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.passed import MegatronPassedArguments
from megarlhf.config.precision import PrecisionArguments
from megarlhf.formats.blends import parse_split

ObjectiveName = Literal["sft", "actor", "critic", "rm", "prm", "dpo", "ipo", "kto", "kd"]


@dataclass(frozen=True, kw_only=True)
class RankArguments:
    """Where supervised training runs."""

    num_gpus_per_node: int = 1
    """Ranks started on this machine: one GPU each, or one process each. Under torchrun its number of ranks wins."""
    gpu_memory_gib: float | None = None
    """Memory of each GPU in GiB, which the plan's bytes must fit into. None: this machine's GPUs tell; without any, the
    plan is printed and compared with nothing."""
    host_memory_gib: float | None = None
    """Memory of each node's host in GiB, for what sleeps and what is stepped there. None: this machine's, where it has
    the GPUs; else it is printed and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class SupervisedBatchArguments:
    """How much work a step is."""

    train_iters: int | None = None
    """Optimizer steps to run, whatever max_epochs is. None: as many as that makes."""
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
class SupervisedOptimizerArguments(AveragedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 5e-6
    """Largest learning rate."""


@dataclass(frozen=True, kw_only=True)
class OneEpochBatchArguments(SupervisedBatchArguments):
    """How much work a step is."""

    max_epochs: int = 1
    """Passes over the data."""


@dataclass(frozen=True, kw_only=True)
class PairBatchArguments(OneEpochBatchArguments):
    """How much work a step is; sequences are pairs of answers here."""

    max_len: int = 512
    """Longest sequence in tokens, prompt and one response together."""
    share_prompt_prefix: bool | None = None
    """Compute the prompt once for both answers. None: on where the layout allows it."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOptimizerArguments(SupervisedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-5
    """Largest learning rate."""


@dataclass(frozen=True, kw_only=True)
class SupervisedDataArguments(RenderingArguments):
    """What to train on."""

    dataset: str
    """Training data: a .jsonl, .json, .csv, .parquet or .arrow file, a directory of such files (json@DIR chooses those
    of a type), or one saved with datasets. Several with commas between them."""
    dataset_probs: str | None = None
    """Numbers with commas between them, one for each data set: rows are drawn in these proportions until one data set
    has no more. None: all rows of all of them."""
    train_split: str = "train"
    """Split to train on, of data sets that have several."""
    eval_dataset: str | None = None
    """Evaluation data, in the same formats; all rows of all data sets. None: eval_split of the training data sets."""
    eval_split: str | None = None
    """Split to evaluate on; or a part such as 0.03, which is drawn from the training data and taken out of it. None: no
    evaluation, or the only split of eval_dataset."""

    data_cache_path: str | None = None
    """Directory that keeps tokenized data: a later run with the same files and options reads it there. None: tokenize
    at each start."""

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_dataset is not None or self.eval_split is not None

    @property
    def appends_eos(self) -> bool:
        """Whether each row ends with the tokenizer's EOS."""
        return True


@dataclass(frozen=True, kw_only=True)
class SFTDataArguments(SupervisedDataArguments):
    """Conversations or prompt-response pairs to imitate, or documents to go on pre-training with."""

    dataset: str = ""
    """Training data: a .jsonl, .json, .csv, .parquet or .arrow file, a directory of such files (json@DIR chooses those
    of a type), or one saved with datasets. Several with commas between them. Empty: data_path."""
    input_key: str = "input"
    """Column with the prompt, or with the whole conversation where output_key is None."""
    output_key: str | None = None
    """Column with the response. None: input_key holds the whole conversation."""
    pretrain_mode: bool = False
    """Train on the prompt's tokens as well."""
    multiturn: bool = False
    """Train on every turn of the assistant in a chat, and not on the last one only."""
    data_path: tuple[str, ...] = ()
    """Megatron's indexed data sets in the place of dataset: paths without .bin and .idx, or weight path weight path ...
    Their documents are joined and cut to sequences of max_len tokens."""
    split: str = "969,30,1"
    """Parts of the documents of data_path for training, validation and test; the last is not read."""
    eval_iters: int = 100
    """Batches of the validation part in an evaluation, at most."""

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        parts = parse_split(self.split)
        return parts is not None and parts[1] > 0 if self.data_path else super().evaluates

    @property
    def appends_eos(self) -> bool:
        """Whether each row ends with the tokenizer's EOS; indexed data is tokens already."""
        return not self.data_path


@dataclass(frozen=True, kw_only=True)
class PreferenceDataArguments(SupervisedDataArguments):
    """Pairs of answers, one of which is preferred."""

    prompt_key: str | None = None
    """Column with the prompt. None: the other two hold whole conversations, or without apply_chat_template whole texts,
    that begin with the same prompt."""
    chosen_key: str = "chosen"
    """Column with the preferred answer."""
    rejected_key: str = "rejected"
    """Column with the other answer."""


@dataclass(frozen=True, kw_only=True)
class KTODataArguments(SupervisedDataArguments):
    """Answers that are labelled as desirable or not."""

    input_key: str = "input"
    """Column with the prompt, or with the whole conversation where output_key is None."""
    output_key: str | None = None
    """Column with the response. None: input_key holds the whole conversation."""
    label_key: str = "label"
    """Column that says whether the response is desirable: 1, 0, true or false."""


@dataclass(frozen=True, kw_only=True)
class DPOArguments:
    """The loss of pairs, and the reference."""

    beta: float = 0.1
    """How strongly the policy is held near the reference."""
    ipo: bool = False
    """IPO in place of DPO: the squared distance of the difference of log-ratios from 1 / (2 * beta)."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round (conservative DPO)."""
    nll_loss_coef: float = 0.0
    """Weight of the chosen answers' cross-entropy, added to the loss."""
    ref_pretrain: str | None = None
    """Local directory of the reference's Hugging Face checkpoint, of pretrain's architecture. None: pretrain."""
    ref_offload: bool = True
    """Have the reference on the device only while it computes. Off: it stays there, which saves copies from the host's
    memory."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs of all data before training, into a file beside the run directory that later
    runs with the same reference and data read, and keep no reference."""


@dataclass(frozen=True, kw_only=True)
class KTOArguments:
    """The loss of labelled answers."""

    beta: float = 0.01
    """How strongly the policy is held near the reference."""
    desirable_loss_weight: float = 1.0
    """Weight of desirable answers."""
    undesirable_loss_weight: float = 1.0
    """Weight of the others."""
    ref_offload: bool = True
    """Have the reference on the device only while it computes. Off: it stays there, which saves copies from the host's
    memory."""


@dataclass(frozen=True, kw_only=True)
class ParityArguments:
    """What is compared."""

    num_gpus_per_node: int | None = None
    """Ranks of the layout, all on this machine: one GPU each, or one process each. None: as few as the layout takes,
    TP * PP * CP, or the next multiple of it that EP * ETP * PP divides. Give twice as many to see data parallelism."""
    objectives: tuple[ObjectiveName, ...] = ("sft", "actor", "critic")
    """Losses to run: supervised, the PPO policy's, the critic's, those of reward models and of preferences, and kd,
    distillation from a teacher that is drawn."""
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
    """What all supervised programs have; each adds its data and its loss.

    Attributes:
        program: name of the command, and of its metrics before the slash.
        head: what the trained model computes: vocabulary logits, or one value a token.
        rows_per_unit: rows that stay together in a micro-batch.
    """

    program: ClassVar[str]
    head: ClassVar[Literal["lm", "value"]] = "lm"
    rows_per_unit: ClassVar[int] = 1
    model: ModelArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    kernels: KernelArguments = field(default_factory=KernelArguments)
    precision: PrecisionArguments = field(default_factory=PrecisionArguments)
    ranks: RankArguments = field(default_factory=RankArguments)
    batch: SupervisedBatchArguments = field(default_factory=SupervisedBatchArguments)
    optimizer: SupervisedOptimizerArguments = field(default_factory=SupervisedOptimizerArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    data: SupervisedDataArguments
    logging: LoggingArguments
    passed: MegatronPassedArguments = field(default_factory=MegatronPassedArguments)

    @property
    def share_prompt_prefix(self) -> bool:
        """Whether rows of one unit share their prompt's computation."""
        return False

    @property
    def ref_pretrain(self) -> str | None:
        """Directory of the reference's weights; None where there is no reference, or it is the start."""
        return None

    @property
    def other_models(self) -> dict[str, str]:
        """Language models that only compute beside the trained one: option -> directory."""
        return {}

    @property
    def keeps_reference(self) -> bool:
        """Whether the start's weights stay beside those that are trained."""
        return False

    @property
    def keeps_resident(self) -> bool:
        """Whether these stay on the device too."""
        return False

    @property
    def world_size(self) -> int:
        """Ranks that train: torchrun's, or those that are started here."""
        started = os.environ.get("WORLD_SIZE", "")
        return int(started) if started.isdecimal() else self.ranks.num_gpus_per_node

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row, or of the longest rows that stay together."""
        return self.rows_per_unit * self.batch.max_len

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens in one forward and backward pass of a rank."""
        return self.batch.max_tokens_per_micro_batch or self.batch.micro_batch_size * self.max_row_tokens


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning."""

    program = "sft"
    data: SFTDataArguments


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SupervisedConfig):
    """What the programs have that train on pairs of a chosen and a rejected answer."""

    rows_per_unit = 2
    batch: PairBatchArguments = field(default_factory=PairBatchArguments)
    data: PreferenceDataArguments

    @property
    def share_prompt_prefix(self) -> bool:
        """Whether the two answers share their prompt's computation, once that is decided."""
        return bool(self.batch.share_prompt_prefix)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairsConfig):
    """Direct preference optimisation: DPO, cDPO and IPO."""

    program = "dpo"
    optimizer: PreferenceOptimizerArguments = field(default_factory=PreferenceOptimizerArguments)
    dpo: DPOArguments = field(default_factory=DPOArguments)

    @property
    def ref_pretrain(self) -> str | None:
        """Directory of the reference's weights; None: the start's."""
        return self.dpo.ref_pretrain

    @property
    def keeps_reference(self) -> bool:
        """Whether a second set of weights is there: precomputing takes the start's own before they change."""
        return not self.dpo.precompute_ref_log_probs or self.dpo.ref_pretrain is not None

    @property
    def keeps_resident(self) -> bool:
        """Whether it stays on the device."""
        return not self.dpo.ref_offload


@dataclass(frozen=True, kw_only=True)
class KTOConfig(SupervisedConfig):
    """Kahneman-Tversky optimisation from labelled answers."""

    program = "kto"
    keeps_reference = True
    batch: OneEpochBatchArguments = field(default_factory=OneEpochBatchArguments)
    optimizer: PreferenceOptimizerArguments = field(default_factory=PreferenceOptimizerArguments)
    data: KTODataArguments
    kto: KTOArguments = field(default_factory=KTOArguments)

    @property
    def keeps_resident(self) -> bool:
        """Whether the reference stays on the device."""
        return not self.kto.ref_offload
