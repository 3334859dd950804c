"""Options of what is measured on held-out prompts."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """What the policy is asked besides what it is trained on."""

    eval_data: str | None = None
    """Prompts of the evaluation, in the formats of prompt_data; several sets with commas between them, each named for
    its file or as in math=PATH,code=PATH. eval/accuracy is the fraction of them whose one greedy response has a reward
    of at least 1 by rule and function, of those with a result. None: no evaluation."""
    eval_split: str | None = None
    """Split to take them from, of data sets that have several. None: the only one."""
    eval_n_samples_per_prompt: int = 0
    """Responses sampled for each of them besides the greedy one, for eval/pass@1, 2, 4, ... up to this many. 0: none.
    Their seeds depend on seed and the prompt's row, not on the step."""
    eval_temperature: float | None = None
    """Temperature of these samples. None: temperature."""
