"""Options of `megarlhf eval`."""

from dataclasses import dataclass, field
from pathlib import Path

from megarlhf.config.arguments import PPOConfig, PromptColumnArguments, SamplingArguments, WeightsArguments
from megarlhf.config.cluster_arguments import EngineArguments
from megarlhf.config.command_line import config_of
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.config.layouts import RewardLayoutArguments
from megarlhf.config.loop_arguments import ForwardArguments, RewardModelsArguments, prompts_at_a_time
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
    models: RewardModelsArguments = field(default_factory=RewardModelsArguments)
    reward_layout: RewardLayoutArguments = field(default_factory=RewardLayoutArguments)
    forward: ForwardArguments = field(default_factory=ForwardArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    result: ResultArguments
    passed: VLLMPassedArguments = field(default_factory=VLLMPassedArguments)

    def as_ppo(self) -> PPOConfig:
        """The same engines and reward models as in RL; nothing of it is trained."""
        responses = 1 + self.evaluation.eval_n_samples_per_prompt
        return config_of(
            PPOConfig,
            self,
            prompt_data=self.evaluation.eval_data,
            save=str(Path(self.result.output).absolute().parent),  # logs/ of the processes
            ray=False,
            advantage_estimator="reinforce",
            rollout_batch_size=prompts_at_a_time(self.rollout, self.cluster, num_responses=responses),
            n_samples_per_prompt=responses,
        )
