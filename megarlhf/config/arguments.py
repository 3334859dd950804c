"""Every option of the programs: one frozen dataclass a group, one docstring a field, which is also its `--help` text.

Parallelism, batch and precision options carry Megatron's names, RLHF options those of OpenRLHF 0.5. Field names are
unique across groups: flags are flat, code reads `config.layout.tensor_model_parallel_size`. Defaults stand here and in
the files that this one imports."""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from megarlhf.config.algorithm_arguments import AlgorithmArguments
from megarlhf.config.cluster_arguments import ClusterArguments
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.config.layouts import CriticLayoutArguments, KernelArguments, LayoutArguments, RewardLayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.passed import PassedArguments
from megarlhf.config.precision import Dtype, RLPrecisionArguments, wide_dtype
from megarlhf.config.pretraining_arguments import PretrainingArguments
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.formats.run_checkpoints import LATEST


@dataclass(frozen=True, kw_only=True)
class WeightsArguments:
    """Which weights to start from."""

    pretrain: str
    """Local directory of the Hugging Face checkpoint to start from: config.json, *.safetensors and tokenizer files."""
    tokenizer: str | None = None
    """Local directory of the tokenizer. None: the same as pretrain."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; fp32 otherwise."""
    seed: int = 42
    """Seed of data order, sampling and initialization, for every role."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments(WeightsArguments):
    """Which weights to start from."""

    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss of models with experts. 0: none."""


@dataclass(frozen=True, kw_only=True)
class RLModelArguments(ModelArguments):
    """Which weights to start from, the critic's included, and the reward models."""

    critic_pretrain: str | None = None
    """Local directory of the critic's starting checkpoint (PPO with gae only). None: the first of reward_pretrain, else
    the same as pretrain."""
    reward_pretrain: str | None = None
    """Local directories of reward models, with commas between several: ...ForSequenceClassification checkpoints with
    one label, such as megarlhf rm exports. None: no reward model."""
    save_value_network: bool = False
    """Export the critic too at the end (gae only), as a sequence classifier, to <save>/hf_critic."""


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """How much work a step is."""

    train_iters: int | None = None
    """RL steps to run, whatever num_episodes is; each one generates, scores and trains on rollout_batch_size prompts.
    None: as many as num_episodes makes."""
    num_episodes: int = 1
    """Passes over the prompts; those that dynamic_filtering draws more of do not count."""
    rollout_batch_size: int = 128
    """Prompts in a step."""
    n_samples_per_prompt: int = 1
    """Responses generated for each prompt."""
    global_batch_size: int = 128
    """Samples in an optimizer step, over all ranks. Divides rollout_batch_size * n_samples_per_prompt."""
    micro_batch_size: int = 4
    """Samples of full length in one forward and backward pass of a rank. Samples are packed without padding."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens in a rank's forward and backward pass. None: micro_batch_size * (prompt_max_len + generate_max_len)."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits a rank holds at once, in fp32: fewer take less memory, and each chunk but a micro-batch's
    last is computed twice in training."""
    max_epochs: int = 1
    """Times the samples of one step are trained on."""
    share_prompt_prefix: bool | None = None
    """Compute the prompt once for all of its samples in a micro-batch. None: on where the layout allows it."""

    @property
    def total_steps(self) -> int:
        """RL steps of the run, once the data is known."""
        assert self.train_iters is not None, "resolved before anything starts"
        return self.train_iters

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of an RL step."""
        return self.max_epochs * (self.rollout_batch_size * self.n_samples_per_prompt // self.global_batch_size)


@dataclass(frozen=True, kw_only=True)
class SharedOptimizerArguments:
    """AdamW and its learning-rate schedule."""

    lr_warmup_ratio: float = 0.03
    """Fraction of all optimizer steps during which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, and the least, as a fraction of its maximum."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    adam_beta1: float = 0.9
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of AdamW's running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Term added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; larger ones are scaled down to it. 0: no clipping; the norm is
    reported, and a step where it is not finite refused, all the same."""
    optimizer_cpu_offload: bool = False
    """Keep AdamW's moments and fp32 main weights in the host's memory, and step there: far less memory of the device,
    slower steps. Needs use_distributed_optimizer."""
    optimizer_offload_fraction: float = 1.0
    """With optimizer_cpu_offload: part of the numbers that is kept and stepped on the host."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy gradients and weights of some parameters while others are stepped."""


@dataclass(frozen=True, kw_only=True)
class AveragedOptimizerArguments(SharedOptimizerArguments):
    """AdamW and its learning-rate schedule."""

    enable_ema: bool = False
    """Average the weights over the optimizer steps, in RL the actor's, and export the average beside the model, to
    <save>/hf_ema."""
    ema_decay: float = 0.992
    """Part of the average that stays at each step."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments(AveragedOptimizerArguments):
    """AdamW and its learning-rate schedule, for actor and critic."""

    actor_learning_rate: float = 1e-6
    """Largest learning rate of the actor."""
    critic_learning_rate: float = 9e-6
    """Largest learning rate of the critic."""
    freezing_actor_steps: int = -1
    """RL steps at the start that train only the critic. -1: none."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """How responses are generated (vLLM)."""

    prompt_max_len: int = 1024
    """Longest prompt in tokens; longer ones are dropped and counted."""
    generate_max_len: int = 1024
    """Longest response in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities of the trainer are taken at the same temperature."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability. In training log-probs, entropy and KL are of
    the distribution over these tokens. 1: all."""
    top_k: int = -1
    """Sample from the k likeliest tokens, of which top_p then chooses. -1: all."""
    min_p: float = 0.0
    """Leave out tokens less than this times as likely as the likeliest, before top_k and top_p. 0: none."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens that prompt and response hold already, above 1 (below: a factor). Only 1 (off) is
    offered in training."""
    max_num_seqs: int = 256
    """Sequences an engine works on at once."""
    vllm_gpu_memory_utilization: float = 0.5
    """Fraction of a GPU's memory for a vLLM engine (GPUs only)."""
    vllm_kv_cache_gib: float = 1.0
    """Size of a vLLM engine's KV cache in GiB (machines without GPUs only)."""
    enforce_eager: bool = True
    """Run vLLM without compiled graphs: slower steps, faster start, less memory."""

    @property
    def is_truncated(self) -> bool:
        """Whether a part of the distribution is never sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, kw_only=True)
class RolloutArguments(SamplingArguments):
    """How responses are generated (vLLM), and how far the trainer's log-probs may be from vLLM's."""

    logprob_diff_budget: float = 0.05
    """Tolerated mean of |log p(vLLM) - log p(trainer)| over the sampled tokens of a step, in nats. Above it a phase
    in FP8 leaves it, or the run warns; above ten times it the run stops, in fp32 also for a single token's."""
    logprob_kl_budget: float = 0.01
    """Tolerated KL divergence of the trainer's policy from vLLM's, estimated from the same tokens, in nats a token.
    Above it the run warns, above ten times it the run stops."""


@dataclass(frozen=True, kw_only=True)
class RenderingArguments:
    """How rows become text."""

    apply_chat_template: bool = False
    """Render prompts and conversations with the tokenizer's chat template."""
    input_template: str | None = None
    """Text around each prompt, which takes the place of {}: "User: {}\\nAssistant: "."""
    tokenizer_chat_template: str | None = None
    """Chat template that replaces the tokenizer's own: a Jinja file, or its text."""
    max_samples: int | None = None
    """Use only the first rows of the data, this many. None: all."""


@dataclass(frozen=True, kw_only=True)
class PromptColumnArguments(RenderingArguments):
    """How rows become prompts."""

    input_key: str = "input"
    """Column with the prompt: text, or a list of chat messages."""
    label_key: str = "label"
    """Column with the reference answer for the reward, any JSON value; may be absent where the reward needs none."""


@dataclass(frozen=True, kw_only=True)
class PromptDataArguments(PromptColumnArguments):
    """Prompts to generate from."""

    prompt_data: str
    """Prompts: a .jsonl, .json, .csv, .parquet or .arrow file, a directory of such files (json@DIR chooses those of a
    type), or one saved with datasets. Several with commas between them."""
    prompt_data_probs: str | None = None
    """Numbers with commas between them, one for each of several data sets: rows are drawn in these proportions until
    one has no more. None: all rows of all of them."""
    prompt_split: str = "train"
    """Split to take prompts from, of data sets that have several."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What is written, where and how often."""

    save: str
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, the trained model in hf/, and logs."""
    save_interval: int | None = None
    """Steps between checkpoints. None: only after the last step."""
    log_interval: int = 1
    """Steps between lines on the console; metrics.jsonl gets every step."""
    max_ckpt_num: int = 3
    """Checkpoints kept; the oldest is deleted after a newer one is complete."""
    max_ckpt_mem: float | None = None
    """GiB of the checkpoints kept, together: the oldest are deleted, and the newest stays in any case. None: no
    limit."""
    use_tensorboard: bool = False
    """Write TensorBoard files to <save>/tensorboard."""
    use_wandb: bool = False
    """Log to Weights & Biases. The key is read from WANDB_API_KEY; WANDB_MODE=offline needs none."""
    wandb_project: str = "megarlhf"
    """Project at Weights & Biases."""
    wandb_run_name: str | None = None
    """Run name at Weights & Biases. None: the last part of save."""
    wandb_org: str | None = None
    """Team or user at Weights & Biases. None: the key's own, or WANDB_ENTITY."""
    wandb_group: str | None = None
    """Group of runs at Weights & Biases. None: the run name, which all starts of a run share."""

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step that is not the last."""
        return self.save_interval is not None and step % self.save_interval == 0


@dataclass(frozen=True, kw_only=True)
class LoggingArguments(RunArguments):
    """What is written, where and how often, and what is continued."""

    ckpt_path: str | None = None
    """Directory for the checkpoints, such as one on a larger disk; <save>/checkpoints is a link to it then. None: they
    are in save."""
    load: str | None = None
    """Run directory to continue from, often the same as save. None: start from pretrain."""
    load_checkpoint: bool = False
    """Continue from the latest checkpoint in save where there is one; else start, also where save has the metrics of a
    start that ended before its first checkpoint."""
    no_load_optim: bool = False
    """Continue with the weights alone: optimizers forget their running means, as they must where the new layout cannot
    take them over (experts split or no longer split, use_distributed_optimizer changed)."""
    eval_interval: int | None = None
    """Steps between evaluations. One follows the last step in any case, and one comes before RL. None: these, and one
    at the end of each epoch."""
    best_metric: str | None = None
    """Metric of an evaluation, such as eval/accuracy: the checkpoint of the step where it was best is saved and kept
    besides max_ckpt_num others, checkpoints/best links to it, and its model comes to <save>/hf_best. None: no such."""
    best_metric_mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest is best."""

    def continued(self) -> "LoggingArguments":
        """With load where load_checkpoint asks for it and a checkpoint is there."""
        found = os.path.isfile(os.path.join(self.save, "checkpoints", LATEST))
        return replace(self, load=self.save) if self.load_checkpoint and found else self


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Train a policy with reinforcement learning: PPO, REINFORCE(++), RLOO or GRPO."""

    model: RLModelArguments
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    critic_layout: CriticLayoutArguments = field(default_factory=CriticLayoutArguments)
    reward_layout: RewardLayoutArguments = field(default_factory=RewardLayoutArguments)
    kernels: KernelArguments = field(default_factory=KernelArguments)
    precision: RLPrecisionArguments = field(default_factory=RLPrecisionArguments)
    cluster: ClusterArguments = field(default_factory=ClusterArguments)
    batch: BatchArguments = field(default_factory=BatchArguments)
    optimizer: OptimizerArguments = field(default_factory=OptimizerArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    algorithm: AlgorithmArguments = field(default_factory=AlgorithmArguments)
    rollout: RolloutArguments = field(default_factory=RolloutArguments)
    data: PromptDataArguments
    pretraining: PretrainingArguments = field(default_factory=PretrainingArguments)
    reward: RewardArguments = field(default_factory=RewardArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    logging: LoggingArguments
    passed: PassedArguments = field(default_factory=PassedArguments)

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.rollout.prompt_max_len + self.rollout.generate_max_len

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens in one forward and backward pass of a rank."""
        return self.batch.max_tokens_per_micro_batch or self.batch.micro_batch_size * self.max_row_tokens

    @property
    def evaluated_prompts(self) -> int:
        """Prompts that an evaluation answers at a time: with all responses no more than a step's, where that can be."""
        batch, responses = self.batch, 1 + self.evaluation.eval_n_samples_per_prompt
        return max(1, batch.rollout_batch_size * min(batch.n_samples_per_prompt, responses) // responses)

    @property
    def keeps_resident(self) -> bool:
        """Whether what is never trained stays on the devices."""
        return not self.cluster.ref_reward_offload

    @property
    def keeps_reward_moments(self) -> bool:
        """Whether rewards are normalised by their running moments; reward models have their own."""
        return self.algorithm.normalize_reward and self.model.reward_pretrain is None

    @property
    def is_one_pass(self) -> bool:
        """Whether a step's one update gives the log-probs of the policy that sampled, in its own forward pass.

        No other pass needs them before, the KL being part of the loss; with dropout they would be another policy's. The
        reference needs the tokens that a truncated policy keeps.
        """
        algorithm, others = self.algorithm, bool(self.lora.lora_dropout) or self.batch.updates_per_step > 1
        needs_kept = self.rollout.is_truncated or not algorithm.use_kl_loss
        return not others and not (algorithm.init_kl_coef > 0 and needs_kept)

    @property
    def uses_tis(self) -> bool:
        """Whether what vLLM sampled is weighed for the trainer."""
        asked = self.algorithm.use_tis
        return not self.precision.is_fp32(bf16=self.model.bf16) if asked is None else asked

    @property
    def rollout_dtype(self) -> Dtype:
        """What vLLM computes in."""
        return self.precision.rollout_dtype or wide_dtype(bf16=self.model.bf16)
