"""Options of `megarlhf eval`."""

from dataclasses import dataclass, field

from megarlhf.config.arguments import EngineArguments, PromptColumnArguments, SamplingArguments, WeightsArguments
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.config.passed import VLLMPassedArguments
from megarlhf.config.reward_arguments import RewardArguments


@dataclass(frozen=True, kw_only=True)
class ResultArguments:
    """Where the results go."""

    output: str
    """File to write, .json: the metrics, prompts of each set, and the options. The engines' logs/ are beside it."""
    responses: str | None = None
    """File to write, .jsonl: every response with its set, prompt, label and reward. None: none."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model on held-out prompts."""

    model: WeightsArguments
    cluster: EngineArguments = field(default_factory=EngineArguments)
    rollout: SamplingArguments = field(default_factory=SamplingArguments)
    data: PromptColumnArguments = field(default_factory=PromptColumnArguments)
    reward: RewardArguments = field(default_factory=RewardArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    result: ResultArguments
    passed: VLLMPassedArguments = field(default_factory=VLLMPassedArguments)
