"""Options of `megarlhf rm` and `megarlhf prm`."""

from dataclasses import dataclass, field

from megarlhf.config.supervised_arguments import (
    OneEpochBatchArguments,
    PairBatchArguments,
    PairsConfig,
    SupervisedConfig,
    SupervisedDataArguments,
    SupervisedOptimizerArguments,
)


@dataclass(frozen=True, kw_only=True)
class PRMBatchArguments(OneEpochBatchArguments):
    """How much work a step is."""

    micro_batch_size: int = 1
    """Sequences of full length in one forward and backward pass of a rank. Sequences are packed without padding."""


@dataclass(frozen=True, kw_only=True)
class PRMOptimizerArguments(SupervisedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-6
    """Largest learning rate."""


@dataclass(frozen=True, kw_only=True)
class ProcessRewardDataArguments(SupervisedDataArguments):
    """Solutions with a label for each step."""

    input_key: str = "input"
    """Column with the solution: text in which a placeholder token ends each step."""
    label_key: str = "label"
    """Column with a list of labels, one for each placeholder: reward tokens, or probabilities of the first of two."""
    placeholder_token: str
    """The text that ends a step, one token: the model judges the step there."""
    reward_tokens: tuple[str, ...] | None = None
    """Tokens between which the model decides, the good one first where labels are probabilities. None: between all
    tokens of the vocabulary, of which each label is one."""

    @property
    def appends_eos(self) -> bool:
        """No: a row ends with its last step."""
        return False


@dataclass(frozen=True, kw_only=True)
class PRMConfig(SupervisedConfig):
    """Process reward model: a judgement of each step of a solution."""

    program = "prm"
    batch: PRMBatchArguments = field(default_factory=PRMBatchArguments)
    optimizer: PRMOptimizerArguments = field(default_factory=PRMOptimizerArguments)
    data: ProcessRewardDataArguments


@dataclass(frozen=True, kw_only=True)
class RMBatchArguments(PairBatchArguments):
    """How much work a step is; sequences are pairs of answers here."""

    micro_batch_size: int = 1
    """Pairs of full length in one forward and backward pass of a rank. Sequences are packed without padding."""


@dataclass(frozen=True, kw_only=True)
class RMOptimizerArguments(SupervisedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 9e-6
    """Largest learning rate."""


@dataclass(frozen=True, kw_only=True)
class RMArguments:
    """The loss of pairs, and the head."""

    margin_loss: bool = False
    """Ask for a reward that is higher by the number in the column margin."""
    value_head_prefix: str = "score"
    """Name of the head's weights in the export: that of Transformers' sequence classifiers."""


@dataclass(frozen=True, kw_only=True)
class RMConfig(PairsConfig):
    """Reward model: one value for an answer, the larger one for the chosen of two."""

    program = "rm"
    head = "value"
    batch: RMBatchArguments = field(default_factory=RMBatchArguments)
    optimizer: RMOptimizerArguments = field(default_factory=RMOptimizerArguments)
    rm: RMArguments = field(default_factory=RMArguments)
