"""What the stages of a loop are configured with: each program's options from those of the loop, by their names."""

from pathlib import Path

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import config_of
from megarlhf.config.loop_arguments import GenerateConfig, IterateConfig, ScoreConfig
from megarlhf.config.supervised_arguments import DPOConfig, SFTConfig
from megarlhf.formats.data_names import held_out_part


def round_directory(config: IterateConfig, number: int) -> Path:
    """Where a round's files lie; round 0 is the evaluation of the model before the first."""
    return Path(config.logging.save) / f"round_{number:03d}"


def generate_config(config: IterateConfig, number: int, model: str) -> GenerateConfig:
    """Samples of a round, from the model before it."""
    return config_of(
        GenerateConfig,
        config,
        pretrain=model,
        iter=number - 1,
        enable_csft=config.iterate.method == "conditional_sft" and number > 1,
        skip_special_tokens=config.reward.reward_skip_special_tokens,
        output=str(round_directory(config, number) / "samples.jsonl"),
    )


def _trains_on_rest(config: IterateConfig) -> bool:
    """Whether eval_split is no name, but a part of what a round selects, or nothing."""
    return config.data.eval_split is None or held_out_part(config.data.eval_split) is not None


def evaluate_config(config: IterateConfig, number: int, model: str) -> GenerateConfig:
    """One greedy response to each evaluation prompt, from the model after a round."""
    return config_of(
        GenerateConfig,
        config,
        pretrain=model,
        prompt_data=config.data.eval_data,
        prompt_data_probs=None,
        prompt_split=config.data.prompt_split if _trains_on_rest(config) else config.data.eval_split,
        n_samples_per_prompt=1,
        greedy=True,
        enable_csft=config.iterate.method == "conditional_sft" and number > 0,
        skip_special_tokens=config.reward.reward_skip_special_tokens,
        output=str(round_directory(config, number) / "eval_samples.jsonl"),
    )


def score_config(config: IterateConfig, dataset: str, output: str) -> ScoreConfig:
    """Rewards of a file of samples, whose columns have the names that generating gives them."""
    return config_of(
        ScoreConfig,
        config,
        dataset=dataset,
        output=output,
        input_key="input",
        output_key="output",
        label_key="label",
        max_samples=None,
        reward_skip_special_tokens=None,
    )


def reward_models_config(config: ScoreConfig) -> PPOConfig | None:
    """The same reward models as in RL; None: none are asked for. Nothing of it is the policy's."""
    if config.models.reward_pretrain is None:
        return None
    return config_of(
        PPOConfig,
        config,
        pretrain=config.models.reward_pretrain.split(",")[0].strip(),
        prompt_data=config.score.dataset,
        save=str(Path(config.score.output).absolute().parent),  # logs/ of the processes
        ray=False,
        advantage_estimator="reinforce",
        prompt_max_len=config.forward.max_len - 1,
        generate_max_len=1,
        share_prompt_prefix=True,
    )


def train_config(config: IterateConfig, number: int, model: str, *, dataset: str) -> SFTConfig | DPOConfig:
    """Training of a round on what was selected, which goes on from its last checkpoint if there is one."""
    text = {"apply_chat_template": False, "input_template": None, "tokenizer_chat_template": None, "max_samples": None}
    run = {"save": str(round_directory(config, number) / "train"), "load_checkpoint": True, "use_wandb": False}
    common = text | run | {"pretrain": model, "dataset": dataset}
    common["eval_split"] = config.data.eval_split if _trains_on_rest(config) else None
    if config.iterate.method != "iterative_dpo":
        return config_of(SFTConfig, config, **common, input_key="input", output_key="output")
    fixed = config.dpo.ref_pretrain or (config.model.pretrain if number > 1 else None)
    reference = fixed if config.iterate.reference == "fixed" else None
    return config_of(DPOConfig, config, **common, prompt_key="prompt", ref_pretrain=reference)
