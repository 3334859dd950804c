"""The run of generate.py, whose options are checked already: load the prompts, start the engines, write the file."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megarlhf.cli.errors import running
from megarlhf.cli.prompt_data import resolve_special_tokens
from megarlhf.cli.run import check_weights, resolved_files
from megarlhf.cli.run_ppo import find_machine
from megarlhf.config.arguments import PPOConfig, PromptColumnArguments
from megarlhf.config.command_line import config_of, to_dict, to_yaml
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.loop_arguments import GenerateConfig, prompts_at_a_time
from megarlhf.config.roles import ROLES
from megarlhf.data.loading import DataSource
from megarlhf.data.prompts import PromptData, load_prompts
from megarlhf.data.sampling import PromptSampler
from megarlhf.data.tokenizer import load_tokenizer, stop_tokens
from megarlhf.data.types import Prompt, Rollout
from megarlhf.formats.data_names import probabilities
from megarlhf.formats.growing_lines import GrowingLines
from megarlhf.formats.huggingface import HFWeights, read_config
from megarlhf.metrics.sinks import ConsoleSink
from megarlhf.planner.placement import plan_placement

_FREE = ("output", "vllm_num_engines", "start_timeout_seconds", "phase_timeout_seconds")  # no response depends on them


class Inputs(NamedTuple):
    """What generating reads before anything starts."""

    prompts: list[Prompt]  # in the order in which they are answered
    num_dropped: int  # longer than prompt_max_len
    stop_token_ids: tuple[int, ...]
    identity: dict[str, Any]  # what decides the file


def load(config: GenerateConfig, *, needs_label: bool = False) -> Inputs:
    """Read and check prompts, tokenizer and the model's files.

    Args:
        needs_label: a rule is going to compare with it.
    Raises:
        ValueError: what is wrong with any of them.
    """
    model, data, options = config.model, config.data, config.generate
    check_weights([("pretrain", model.pretrain, LayoutArguments(), "lm")], transformer_impl="local", generates=True)
    tokenizer = load_tokenizer(model.tokenizer or model.pretrain, chat_template=data.tokenizer_chat_template)
    hf_config, probs = read_config(model.pretrain), probabilities(data.prompt_data_probs)
    found: PromptData = load_prompts(
        DataSource(names=data.prompt_data, probs=probs, split=data.prompt_split, seed=model.seed),
        tokenizer,
        input_key=data.input_key,
        label_key=data.label_key,
        apply_chat_template=data.apply_chat_template,
        input_template=data.input_template,
        prompt_max_len=config.rollout.prompt_max_len,
        max_samples=data.max_samples,
        vocab_size=hf_config.vocab_size,
        needs_label=needs_label or data.label_key != PromptColumnArguments.label_key,
        suffix=f" {options.csft_prompt.strip()} " if options.enable_csft else "",
    )
    prompts, number = found.prompts, len(found.prompts)
    if options.iter is not None:
        places = PromptSampler(number, options.rollout_batch_size, model.seed, shuffles=False).batch(options.iter)
        prompts = [prompts[place % number] for place in places]
    stops = tuple(stop.token_id for stop in stop_tokens(tokenizer, model.pretrain, hf_config))
    own = {name: value for name, value in to_dict(config).items() if name not in _FREE}
    files = {"prompts": found.fingerprint, "weights": HFWeights(Path(model.pretrain)).fingerprint()}
    return Inputs(prompts, found.num_dropped, stops, own | files)


def engine_config(config: GenerateConfig, inputs: Inputs) -> PPOConfig:
    """The same engines as in RL, for a part of the prompts in each step."""
    most = prompts_at_a_time(config.rollout, config.cluster, num_responses=config.generate.n_samples_per_prompt)
    ppo = config_of(
        PPOConfig,
        config,
        save=str(Path(config.generate.output).absolute().parent),  # logs/ of the engines
        ray=False,
        rollout_batch_size=min(len(inputs.prompts), most),
    )
    ppo = replace(ppo, reward=replace(ppo.reward, reward_skip_special_tokens=config.generate.skip_special_tokens))
    return resolve_special_tokens(ppo, [prompt.label for prompt in inputs.prompts])


def run(config: GenerateConfig, *, dry_run: bool) -> int:
    """Generate what is not there yet; returns the exit status."""
    inputs = load(config)
    ppo, output = engine_config(config, inputs), Path(config.generate.output)
    plan = plan_placement(ppo, find_machine(ppo), only=[ROLES["rollout"]])
    dropped = f", {inputs.num_dropped} longer than prompt_max_len left out" if inputs.num_dropped else ""
    decided = f"{len(inputs.prompts)} prompts{dropped}\n{plan.table()}"
    if dry_run:
        print(f"{to_yaml(config)}\n{resolved_files(ppo.model, ppo.data)}\n\n{decided}")
        return 0
    from megarlhf.cluster import launch  # with vLLM behind it: nothing above needs it

    print(decided)
    options, per_prompt, size = config.generate, config.generate.n_samples_per_prompt, ppo.batch.rollout_batch_size
    with GrowingLines(output, inputs.identity) as lines:
        answered = finished = lines.num_lines // per_prompt
        if answered < len(inputs.prompts):
            finished = answered // size * size  # whole parts, as without a kill
        lines.keep(finished * per_prompt)
        if answered:
            again = f", {answered - finished} are answered again with the rest of their part"
            print(f"{finished} prompts are answered already{again if answered > finished else ''}")
        if finished < len(inputs.prompts):
            with running(), launch.open_engines(ppo, plan, stop_token_ids=inputs.stop_token_ids) as engines:
                console = ConsoleSink(total_steps=len(inputs.prompts), first_step=finished, unit="prompts")
                with closing(console):
                    for first in range(finished, len(inputs.prompts), size):
                        started, part = time.perf_counter(), inputs.prompts[first : first + size]
                        console.phase("rollout")
                        step = options.iter or 0
                        found = engines.generate(part, step=step, first_place=first, greedy=options.greedy)
                        lines.append(response_rows(found, first_place=first))
                        tokens = sum(sample.response_length for sample in found.samples)
                        speed = tokens / (time.perf_counter() - started)
                        console.log(first + len(part), {"perf/tokens_per_second": speed})
    print(f"{len(inputs.prompts) * per_prompt} samples: {output}")
    return 0


def response_rows(rollout: Rollout, *, first_place: int) -> list[dict[str, Any]]:
    """A line of the file for each sample."""
    return [
        {
            "input": sample.prompt.text,
            "output": sample.response_text.removesuffix(sample.stop_text),
            "label": sample.prompt.label,
            "index": sample.prompt.index,
            "place": first_place + sample.group_id,
            "sample": sample.sample_id,
            "finish_reason": sample.finish_reason,
        }
        | ({"stop_text": sample.stop_text} if sample.stop_text else {})
        for sample in rollout.samples
    ]
