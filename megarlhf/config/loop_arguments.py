"""Options of the loops over batches: generate, score, select, and iterate, which runs all of them and trains."""

from dataclasses import dataclass, field
from typing import Literal

from megarlhf.config.arguments import (
    ModelArguments,
    PromptDataArguments,
    RunArguments,
    SamplingArguments,
    WeightsArguments,
)
from megarlhf.config.cluster_arguments import EngineArguments
from megarlhf.config.layouts import KernelArguments, LayoutArguments, RewardLayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.passed import PassedArguments, VLLMPassedArguments
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.config.supervised_arguments import (
    DPOArguments,
    OneEpochBatchArguments,
    RankArguments,
    SupervisedOptimizerArguments,
)

PostProcessor = Literal["rs", "iter_dpo", "csft"]
_TURNS = 4  # times that a part fills all engines: a part's last responses leave them idle, and a kill loses one part


def prompts_at_a_time(rollout: SamplingArguments, cluster: EngineArguments, *, num_responses: int) -> int:
    """Prompts of which engines alone answer a part, each with so many responses."""
    return -(-_TURNS * rollout.max_num_seqs * cluster.vllm_num_engines // num_responses)


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """What is generated, and where it goes."""

    output: str
    """File to write, .jsonl: input, output, label, index, place, sample and finish_reason of each response, and the
    stop_text behind the output where special tokens are in it. The file appears when it is whole; a run that was killed
    goes on with <output>.partial."""
    n_samples_per_prompt: int = 1
    """Responses to each prompt."""
    greedy: bool = False
    """Take the likeliest token each time, whatever the temperature is."""
    iter: int | None = None
    """Take prompts iter * rollout_batch_size and on of the data, which starts anew behind its last. None: all prompts
    once."""
    rollout_batch_size: int = 2048
    """Prompts of one iter."""
    enable_csft: bool = False
    """Put csft_prompt behind each prompt, as conditional SFT has trained it."""
    csft_prompt: str = "<rm_score>: 5.00"
    """Text with the reward that is asked for. The file has the prompt without it."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the responses' text; the stop token always is. None: they are in where a label holds
    one."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer prompts with vLLM, into a file."""

    model: WeightsArguments
    cluster: EngineArguments = field(default_factory=EngineArguments)
    rollout: SamplingArguments = field(default_factory=SamplingArguments)
    data: PromptDataArguments
    generate: GenerateArguments
    passed: VLLMPassedArguments = field(default_factory=VLLMPassedArguments)


@dataclass(frozen=True, kw_only=True)
class ScoreArguments:
    """What is scored, and where it goes."""

    dataset: str
    """Samples: a .jsonl, .json, .csv, .parquet or .arrow file with a prompt and a response in each row."""
    output: str
    """File to write, .jsonl: the same rows with their reward, null where there is no result, and its parts, each
    source's own score by its name. It appears when it is whole; a run that was killed goes on with <output>.partial."""
    input_key: str = "input"
    """Column with the prompt, as the model has read it."""
    output_key: str = "output"
    """Column with the response."""
    label_key: str = "label"
    """Column with the reference answer, any JSON value; may be absent where the reward needs none."""
    max_samples: int | None = None
    """Score only the first rows, this many. None: all."""


@dataclass(frozen=True, kw_only=True)
class RewardModelsArguments:
    """Reward models that score."""

    reward_pretrain: str | None = None
    """Local directories of reward models, with commas between several: ...ForSequenceClassification checkpoints with
    one label, such as megarlhf rm exports. None: no reward model."""
    reward_num_gpus_per_node: int | None = None
    """Ranks of each reward model: one GPU each, or one process each on a machine without GPUs. None: one."""


@dataclass(frozen=True, kw_only=True)
class ForwardArguments:
    """How reward models compute."""

    micro_batch_size: int = 4
    """Samples of full length in one forward pass of a rank. Samples are packed without padding."""
    normalize_reward: bool = False
    """Subtract from each model's score the mean that its config.json has and divide by the std there."""
    gpu_memory_gib: float | None = None
    """Memory of each GPU in GiB, which the reward models must fit into. None: this machine's GPUs tell; without any,
    the plan is printed and compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class ScoreForwardArguments(ForwardArguments):
    """How reward models compute."""

    bf16: bool = False
    """Compute in bfloat16."""
    max_len: int = 2048
    """Longest sample in tokens; longer ones, and those longer than a model knows, have no result."""
    start_timeout_seconds: float = 300.0
    """Seconds for all processes to be up and their models loaded."""
    phase_timeout_seconds: float = 1800.0
    """Seconds for the scores of one part of the file."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Give each sample of a file its reward."""

    score: ScoreArguments
    models: RewardModelsArguments = field(default_factory=RewardModelsArguments)
    reward_layout: RewardLayoutArguments = field(default_factory=RewardLayoutArguments)
    forward: ScoreForwardArguments = field(default_factory=ScoreForwardArguments)
    reward: RewardArguments = field(default_factory=RewardArguments)


@dataclass(frozen=True, kw_only=True)
class ConditionArguments:
    """How conditional SFT writes rewards into prompts (csft)."""

    normalize_reward: bool = False
    """csft: shift and scale rewards to mean 0 and std 1 over the file first. In iterate also, of each model of
    reward_pretrain: subtract the mean that its config.json has and divide by the std there."""
    reward_template: str = "{input} <rm_score>: {reward} "
    """Prompt and its reward, which take the place of {input} and {reward}."""


@dataclass(frozen=True, kw_only=True)
class SelectArguments(ConditionArguments):
    """What is selected of scored samples."""

    dataset: str
    """Scored samples: a file that megarlhf score has written, or one with input, output and reward in each row."""
    output: str
    """File to write, .jsonl, for megarlhf sft (rs, csft: input, output) or megarlhf dpo (iter_dpo: prompt, chosen,
    rejected)."""
    post_processor: PostProcessor
    """rs: the best sample of each prompt. iter_dpo: its best and its worst, unless they are equal. csft: all, with
    their reward in the prompt."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Make training data of scored samples."""

    select: SelectArguments


@dataclass(frozen=True, kw_only=True)
class IterateArguments(ConditionArguments):
    """What a round is, and how many there are."""

    method: Literal["rejection_sampling", "iterative_dpo", "conditional_sft"]
    """What a round trains on: the best sample of each prompt (SFT), its best and worst (DPO), or all samples with their
    reward in the prompt (SFT)."""
    num_rounds: int = 10
    """Rounds of generating, scoring, selecting and training."""
    rollout_batch_size: int = 2048
    """Prompts of a round: the next of the data, which starts anew behind its last."""
    n_samples_per_prompt: int = 4
    """Responses to each prompt."""
    reference: Literal["fixed", "moving"] = "fixed"
    """What iterative_dpo holds the policy near: the model before the first round, or the one before each."""
    csft_prompt: str = "<rm_score>: 5.00"
    """conditional_sft: the reward that prompts ask for, once a round has been trained."""


@dataclass(frozen=True, kw_only=True)
class IterateDataArguments(PromptDataArguments):
    """Prompts to learn from, and others to evaluate on."""

    eval_data: str | None = None
    """Prompts of the evaluation, in the same formats: eval/accuracy is the fraction of them whose one greedy response
    has a reward of at least 1 by rule and function, of those with a result. None: no evaluation."""
    eval_split: str | None = None
    """Split to take them from. None: prompt_split. Or a part such as 0.03 of the rows that each round selects: it is
    taken out of what the round trains on, and its training is evaluated on it."""


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """Rounds of generating, scoring, selecting and training: rejection sampling, iterative DPO, conditional SFT."""

    iterate: IterateArguments
    model: ModelArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    kernels: KernelArguments = field(default_factory=KernelArguments)
    ranks: RankArguments = field(default_factory=RankArguments)
    batch: OneEpochBatchArguments = field(default_factory=OneEpochBatchArguments)
    optimizer: SupervisedOptimizerArguments = field(default_factory=SupervisedOptimizerArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    dpo: DPOArguments = field(default_factory=DPOArguments)
    cluster: EngineArguments = field(default_factory=EngineArguments)
    rollout: SamplingArguments = field(default_factory=SamplingArguments)
    data: IterateDataArguments
    models: RewardModelsArguments = field(default_factory=RewardModelsArguments)
    reward_layout: RewardLayoutArguments = field(default_factory=RewardLayoutArguments)
    reward: RewardArguments = field(default_factory=RewardArguments)
    logging: RunArguments
    passed: PassedArguments = field(default_factory=PassedArguments)
