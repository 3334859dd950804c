"""What the programs share: signals, the models' files and what computes their layers, the run directory."""

import shutil
import signal
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from megarlhf.cli.errors import all_or_errors
from megarlhf.config.arguments import LoggingArguments, ModelArguments, PPOConfig, PromptDataArguments
from megarlhf.config.check_kernels import kernel_errors, kernel_warnings
from megarlhf.config.check_precision import precision_device_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.layouts import KernelArguments, LayoutArguments, TransformerImpl
from megarlhf.config.lora import LoraArguments
from megarlhf.config.roles import LISTS
from megarlhf.config.supervised_arguments import ParityConfig, SupervisedConfig, SupervisedDataArguments
from megarlhf.data.token_ids import token_text
from megarlhf.data.tokenizer import load_tokenizer, stop_tokens, template_source
from megarlhf.formats import run_checkpoints
from megarlhf.formats.huggingface import HFConfig, HFWeights, has_score_head, read_checkpoint, read_config
from megarlhf.formats.staging import write_whole
from megarlhf.metrics.sinks import Sinks
from megarlhf.models.backend import fused_adam, model_backend, resolve_transformer_impl
from megarlhf.models.names import check_names, check_reward_model, stored_dtypes
from megarlhf.models.registry import check_computing, check_engine_head, check_transformer_engine, find_architecture
from megarlhf.models.targets import check_model_targets, check_quantised
from megarlhf.parallel.device import DeviceKind, device_capability


class StopSignal:
    """Turns true when SIGTERM or SIGUSR1 arrives: finish the step, save, exit."""

    def __init__(self) -> None:
        self.received = False
        self.listen()

    def listen(self) -> None:
        """Take both signals, also back from a library that has taken them since."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving and leaving", file=sys.stderr)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received


class Opened(NamedTuple):
    """A model whose files are open."""

    config: HFConfig  # with what the weights say of the output layer
    weights: HFWeights
    head: str


def check_weights(
    models: Sequence[tuple[str, str, LayoutArguments, str]],
    *,
    transformer_impl: TransformerImpl,
    generates: bool = False,
    lora: LoraArguments | None = None,
) -> list[Opened]:
    """Open models, the headers of their weights alone.

    Args:
        models: option that names the directory, directory, the layout that it is to have, and its head.
        transformer_impl: what their layers are computed with.
        generates: vLLM loads the first of them too.
        lora: adapters that they are to have; None: none.
    Raises:
        ConfigError: architectures that cannot be trained so, weight files that are not whole, tensors that do not fit
            the configuration, or target modules that a model has not.
    """
    read = cache(read_checkpoint)

    def opened(option: str, directory: str, layout: LayoutArguments, head: str) -> Opened:
        config, source = read(directory, option=option)
        if option.startswith(LISTS):
            check_reward_model(config, source)
        if head == "lm" and has_score_head(config):
            raise ValueError(f"{source.source}; architectures={config.architectures} generate no text: use another")
        try:
            arch = find_architecture(config)
            check_computing(arch, config)
            if transformer_impl == "transformer_engine":
                check_transformer_engine(arch, config, context_parallel_size=layout.context_parallel_size)
        except ValueError as error:
            raise ValueError(f"{source.source}; {error}") from error
        check_names(arch, config, source, head)
        stored_dtypes(arch, config, source, head)
        if lora is not None:
            grouped = transformer_impl == "transformer_engine"
            check_model_targets(lora, arch, config, grouped_experts=grouped)
            if lora.load_in_4bit:
                check_quantised(arch, config, layout)
        if generates and directory == models[0][1] and head == models[0][3]:
            check_engine_head(arch, config, source)
        return Opened(config, source, head)

    return all_or_errors([partial(opened, *model) for model in models])


def resolve_kernels(
    config: PPOConfig | SupervisedConfig | ParityConfig,
    layouts: Sequence[tuple[str, LayoutArguments]],
    *,
    share_prompt_prefix: bool,
    device: DeviceKind,
) -> TransformerImpl:
    """What computes the layers on these devices; what is legal and slow is said on stderr.

    Args:
        layouts: each with the prefix of its options.
    Raises:
        ConfigError: it is not installed, or cannot compute as asked.
    """
    bf16, impl = config.model.bf16, resolve_transformer_impl(config.kernels.transformer_impl, device=device)
    modules = config.passed.megatron.get("recompute_modules")
    errors = []
    joins = isinstance(config, PPOConfig) and config.cluster.ray_address is not None  # other nodes may have other GPUs
    if not isinstance(config, ParityConfig):
        errors = precision_device_errors(
            config.precision,
            impl,
            bf16=bf16,
            on_gpu=device == "gpu",
            capability=None if joins else device_capability(),  # workers then say what theirs cannot
            recompute_modules=modules,
        )
    raise_if(
        errors
        + kernel_errors(
            impl,
            layouts,
            bf16=bf16,
            share_prompt_prefix=share_prompt_prefix,
            recompute_modules=modules,
            load_in_4bit=not isinstance(config, ParityConfig) and config.lora.load_in_4bit,
            offload_fraction=1.0 if isinstance(config, ParityConfig) else config.optimizer.optimizer_offload_fraction,
            fused_adam=device == "cpu" or fused_adam().on,
        )
    )
    for warning in kernel_warnings(impl, bf16=bf16):
        print(f"warning: {warning}", file=sys.stderr)
    return impl


def kernel_lines(kernels: KernelArguments, models: Sequence[HFConfig], *, device: DeviceKind) -> str:
    """What each model is computed with, in lines for the start log; models that agree share theirs."""
    backends = (model_backend(find_architecture(model), model, kernels, device=device) for model in models)
    return "\n".join(dict.fromkeys("\n".join(backend.lines()) for backend in backends))


def resolved_files(model: ModelArguments, data: PromptDataArguments | SupervisedDataArguments) -> str:
    """For `--dry-run`: tokenizer, chat template, tokens that end a response, and dtypes, with the files they come from.

    A supervised run has no stop tokens: what it puts after each row is the tokenizer's EOS.

    Raises:
        ValueError: files that cannot be read.
    """
    directory = model.tokenizer or model.pretrain
    tokenizer = load_tokenizer(directory, chat_template=data.tokenizer_chat_template)
    config = read_config(model.pretrain)
    rendered, none = data.apply_chat_template, "none (apply_chat_template=False)"
    lines = [
        f"tokenizer: {directory} ({len(tokenizer)} tokens; vocab_size={config.vocab_size})",
        f"chat template: {template_source(directory, data.tokenizer_chat_template) if rendered else none}",
    ]
    if isinstance(data, PromptDataArguments):
        stops = stop_tokens(tokenizer, model.pretrain, config)
        lines += [f"stop token: {stop.token_id} {stop.text} ({', '.join(stop.sources)})" for stop in stops]
    elif data.appends_eos and (token := tokenizer.eos_token_id) is not None:
        lines.append(f"end of every row: {token} {token_text(tokenizer, token)} (the tokenizer's EOS)")
    dtype = "bfloat16" if model.bf16 else "float32"
    lines.append(f"dtype: {dtype} (bf16={model.bf16}); config.json of pretrain says {config.dtype or 'nothing'}")
    return "\n".join(lines)


def open_run_directory(save: str, config_yaml: str, *, ckpt_path: str | None = None) -> Path:
    """Make the run directory and write this start's resolved configuration into it.

    config.yaml is the latest start's; those of earlier ones stay beside it, config-start-1.yaml the first's. With
    ckpt_path checkpoints/ is a link to that.
    """
    directory = Path(save)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = directory / "checkpoints"
    if ckpt_path is not None and not checkpoints.exists():
        Path(ckpt_path).mkdir(parents=True, exist_ok=True)
        if not checkpoints.exists():  # it may be that directory
            checkpoints.symlink_to(Path(ckpt_path).absolute())
    config = directory / "config.yaml"
    if config.exists():
        names = [path.stem.removeprefix("config-start-") for path in directory.glob("config-start-*.yaml")]
        earlier = max((int(name) for name in names if name.isdecimal()), default=0)
        shutil.copy2(config, directory / f"config-start-{earlier + 1}.yaml")
    write_whole(config, config_yaml)
    return directory


def open_sinks(
    logging: LoggingArguments, config: dict[str, Any], *, total_steps: int, resumed_step: int | None
) -> Sinks:
    """Where a run's metrics go, in the run directory that is there already.

    Args:
        config: the resolved configuration, for Weights & Biases.
        resumed_step: of the checkpoint that the run continues from.
    """
    return Sinks(
        Path(logging.save),
        total_steps=total_steps,
        log_interval=logging.log_interval,
        use_tensorboard=logging.use_tensorboard,
        use_wandb=logging.use_wandb,
        project=logging.wandb_project,
        run_name=logging.wandb_run_name,
        entity=logging.wandb_org,
        group=logging.wandb_group,
        config=config,
        resumed_step=resumed_step,
    )


def resumed_step(logging: LoggingArguments, identity: dict[str, Any]) -> int | None:
    """Step of the checkpoint that --load names; None for a fresh run, 0 where --load_checkpoint may start again.

    Raises:
        ValueError: there is no complete checkpoint, or it is of another model.
    """
    if logging.load is None:
        return 0 if logging.load_checkpoint else None
    step, directory, state = run_checkpoints.latest(Path(logging.load) / "checkpoints")
    saved = state.get("identity", {})
    run_checkpoints.check_identity(saved, identity, directory, with_optimizer=not logging.no_load_optim)
    return step


def check_loaded_files(logging: LoggingArguments) -> None:
    """Of the checkpoint that --load names, before ranks read it.

    Raises:
        ValueError: there is no complete one, or it lacks bytes, or its metadata names code, which Megatron-Core would
            run.
    """
    if logging.load is None:
        return
    from megarlhf.formats.torch_dist import METADATA, TorchDistReader  # PyTorch, for those who continue

    _, directory, _ = run_checkpoints.latest(Path(logging.load) / "checkpoints")
    for metadata in sorted(directory.glob(f"*/{METADATA}")):
        TorchDistReader(metadata.parent, f"load={logging.load}")


def check_best_metric(logging: LoggingArguments, reported: Sequence[str]) -> None:
    """Raises ValueError for a best_metric that is not among what an evaluation of the run reports."""
    name = logging.best_metric
    if name is not None and name not in reported:
        raise ValueError(f"best_metric={name} is no metric of an evaluation here: use one of {', '.join(reported)}")


def data_identity(num_rows: int, fingerprint: str) -> str:
    """What a checkpoint and the training data must agree on: the rows and their order, as they are tokenized.

    The place in the data is that many rows into the order drawn from the seed, so another file would be read from
    somewhere else.
    """
    return f"{num_rows} rows, {fingerprint[:16]}"


def model_identity(pretrain: str, *layouts: LayoutArguments, lora: LoraArguments) -> dict[str, Any]:
    """What a checkpoint and a configuration must agree on: the model's shape, and how optimizer state is kept.

    With adapters, which a checkpoint then holds alone, also these, and the weights that they were trained beside. The
    layouts are those of all models that are trained.
    """
    config = read_config(pretrain)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    return {
        "architecture": (config.architectures or ["none"])[0],
        run_checkpoints.OPTIMIZER_STATE: {
            "use_distributed_optimizer": layouts[0].use_distributed_optimizer,
            "expert_model_parallel_size above 1": [layout.expert_model_parallel_size > 1 for layout in layouts],
        },
        "lora": _lora_identity(pretrain, lora) if lora.lora_rank else None,
        **{name: getattr(config, name) for name in names},
    }


def _lora_identity(pretrain: str, lora: LoraArguments) -> dict[str, Any]:
    own = {"rank": lora.lora_rank, "alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules)}
    own |= {"load_in_4bit": True} if lora.load_in_4bit else {}
    return own | {"base": HFWeights(Path(pretrain)).fingerprint()}
