"""OpenRLHF 0.5's batch_inference: its command lines as programs of this package.

python -m megarlhf.cli.batch_inference --eval_task generate_vllm --pretrain M --dataset D --output_path O ...
    is megarlhf generate; --eval_task rm is megarlhf score, and with --post_processor megarlhf select behind it. All
    other flags are those of the programs.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarlhf.cli import generate, score, select
from megarlhf.config.command_line import flags_and_values

PROG = "megarlhf.cli.batch_inference"
_NOT_READ = "OpenRLHF's task does not read it either"
_DEEPSPEED = {
    "zero_stage": "ZeRO is DeepSpeed's, which runs nothing here",
    "local_rank": "ranks come from the launcher's environment",
    "flash_attn": "attention is fused wherever a kernel for it is installed",
    "micro_batch_size": "batches are made by the tokens that they hold",
}
_OF_RM = "output_key max_len value_head_prefix post_processor normalize_reward reward_template"
_OF_GENERATE = (
    "prompt_max_len max_new_tokens greedy_sampling top_p temperature repetition_penalty best_of_n tp_size max_num_seqs "
    "enable_prefix_caching iter rollout_batch_size enable_csft csft_prompt seed"
)
UNREAD: dict[str, dict[str, str]] = {  # task -> flag that is accepted without effect, and why
    "generate": _DEEPSPEED
    | dict.fromkeys(_OF_RM.split(), _NOT_READ)
    | {"enable_prefix_caching": "vLLM's prefix cache is always on here"},
    "rm": _DEEPSPEED
    | dict.fromkeys(_OF_GENERATE.split(), _NOT_READ)
    | {"dataset_probs": "all samples of all data sets are scored"},
}
_RENDERED = "the samples hold prompts as the model has read them: leave it out"
REFUSED: dict[str, dict[str, str]] = {  # task -> flag, why it cannot be used, and what to set instead
    "generate": {},
    "rm": {
        "apply_chat_template": _RENDERED,
        "input_template": _RENDERED,
        "value_head_prefix": "reward models name their head score, as Transformers does: leave it out",
        "dataset_split": "give the path of the split's files as --dataset",
    },
}
RENAMED: dict[str, dict[str, str]] = {  # task -> OpenRLHF's flag -> that of the program
    "generate": {},
    "rm": {"pretrain": "reward_pretrain"},
}
SELECTING = ("post_processor", "normalize_reward", "reward_template")  # flags of the rm task that are select's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task's programs; returns the first exit status that is not 0."""
    errors: list[str] = []
    given = flags_and_values(list(sys.argv[1:] if argv is None else argv), errors)
    flags = {flag.lstrip("-").replace("-", "_"): values for flag, values in given}
    task = " ".join(flags.pop("eval_task", ["nothing"]))
    if task not in ("generate", "generate_vllm", "rm"):
        errors.append(f"--eval_task is {task}: give generate_vllm, generate (the same here) or rm")
    task = "rm" if task == "rm" else "generate"
    errors += [f"--{flag} is not an option here; {why}" for flag, why in REFUSED[task].items() if flag in flags]
    if task == "rm" and "post_processor" in flags and not flags.keys() & {"output_path", "output"}:
        errors.append("--output_path is missing; it has no default: set it")
    if errors:
        print("\n".join(f"{PROG}: error: {error}" for error in errors), file=sys.stderr)
        return 2
    for flag in UNREAD[task].keys() & flags.keys():
        print(f"{PROG}: note: --{flag}: {UNREAD[task][flag]}; no effect", file=sys.stderr)
        del flags[flag]
    flags = {RENAMED[task].get(flag, flag): values for flag, values in flags.items()}
    if task == "generate":
        return generate.main(_words(flags), prog=PROG)
    selecting = {flag: flags.pop(flag) for flag in SELECTING if flag in flags}
    if "normalize_reward" in selecting and "reward_pretrain" in flags:
        flags["normalize_reward"] = selecting["normalize_reward"]
        if selecting.get("post_processor") != ["csft"]:
            del selecting["normalize_reward"]
    if "post_processor" not in selecting:
        return score.main(_words(flags), prog=PROG)
    output = " ".join(flags.pop("output_path", flags.pop("output", [])))
    scored = str(Path(output).with_suffix(".scored.jsonl"))
    selected = _words(selecting | {"dataset": [scored], "output": [output]})
    return score.main(_words(flags | {"output": [scored]}), prog=PROG) or select.main(selected, prog=PROG)


def _words(flags: Mapping[str, Sequence[str]]) -> list[str]:
    """A value that begins with dashes stays one."""
    return [
        word
        for flag, values in flags.items()
        for word in ([f"--{flag}={values[0]}"] if len(values) == 1 else [f"--{flag}", *values])
    ]


if __name__ == "__main__":
    sys.exit(main())
