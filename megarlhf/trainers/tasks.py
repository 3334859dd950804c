"""From the configuration of a supervised program to what it trains, inside a rank."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.lora import LoraArguments
from megarlhf.config.precision import PrecisionArguments
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, SFTConfig, SupervisedConfig
from megarlhf.data.planning import PackingOptions
from megarlhf.data.process_rewards import reward_token_ids
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.assembly import model_options
from megarlhf.trainers.dpo import dpo_task
from megarlhf.trainers.kd import kd_task, top_k_task, with_top_tokens
from megarlhf.trainers.kto import kto_task
from megarlhf.trainers.process_reward_model import process_reward_task
from megarlhf.trainers.reward_model import reward_task
from megarlhf.trainers.sft import sft_task
from megarlhf.trainers.supervised import SupervisedTask


def build_task(config: SupervisedConfig, engine: MegatronEngine) -> SupervisedTask:
    """The objective of the program, and what it needs of the engine before it trains."""
    match config:
        case KDConfig(kd=kd):
            build = partial(frozen_engine, config, kd.teacher_model)
            if kd.teacher_top_k is None:
                return kd_task(engine, build(), kd_coef=kd.kd_coef, direction=kd.kd_loss)
            directory = Path(config.logging.save).parent
            complete = partial(
                with_top_tokens, engine, build, teacher_model=kd.teacher_model, k=kd.teacher_top_k, directory=directory
            )
            return top_k_task(complete, kd_coef=kd.kd_coef, direction=kd.kd_loss)
        case SFTConfig():
            return sft_task()
        case RMConfig():
            return reward_task()
        case PRMConfig(model=model, data=data):
            tokenizer = load_tokenizer(model.tokenizer or model.pretrain, chat_template=None)
            ids = reward_token_ids(tokenizer, data.reward_tokens, engine.hf.vocab_size)
            return process_reward_task(None if ids is None else list(ids.values()))
        case DPOConfig():
            return dpo_task(config, engine)
        case KTOConfig(kto=options):
            return kto_task(options, engine)
    raise AssertionError(f"{type(config).__name__} has no task")


def frozen_engine(config: SupervisedConfig, directory: str) -> MegatronEngine:
    """Another language model in the trained one's processes and layout, which only computes, in bf16 or fp32."""
    return MegatronEngine(
        directory,
        head="lm",
        model=model_options(config.layout, replace(config, lora=LoraArguments(), precision=PrecisionArguments())),
        packing=PackingOptions(max_tokens=config.micro_batch_tokens, share_prefix=config.share_prompt_prefix),
        optimizer=None,
        logprob_chunk_tokens=config.batch.logprob_chunk_tokens,
        seed=config.model.seed,
    )
