"""`megarlhf flags`: what each flag of OpenRLHF 0.5.3's programs means here."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megarlhf.cli.batch_inference import REFUSED, RENAMED, SELECTING, UNREAD
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.command_line import options_of
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig, ScoreConfig
from megarlhf.config.openrlhf_flags import OPENRLHF_FLAGS, meaning
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, SFTConfig, SupervisedConfig

SUPERVISED: dict[str, type[SupervisedConfig]] = {
    config.program: config for config in (SFTConfig, RMConfig, PRMConfig, DPOConfig, KTOConfig, KDConfig)
}
PROGRAMS: dict[str, type[Any]] = SUPERVISED | {"ppo": PPOConfig, "chat": ChatConfig, "serve_rm": ServeConfig}
_TASKS: dict[str, type[Any]] = {"generate": GenerateConfig, "rm": ScoreConfig}  # of batch_inference
_THEIRS = {"ppo": "train_ppo and train_ppo_ray", "chat": "interactive_chat", "serve_rm": "serve_rm"}
_USAGE = f"usage: megarlhf flags [{'|'.join(OPENRLHF_FLAGS)} ...]\n\n"
_USAGE += "What each flag of OpenRLHF 0.5.3's programs means here."


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of these programs, or of all; returns the exit status."""
    chosen = list(sys.argv[1:] if argv is None else argv)
    if "--help" in chosen or "-h" in chosen:
        print(_USAGE)
        return 0
    if unknown := [name for name in chosen if name not in OPENRLHF_FLAGS]:
        names = ", ".join(OPENRLHF_FLAGS)
        print(f"megarlhf flags: error: no program {unknown[0]!r}; they are {names}", file=sys.stderr)
        return 2
    for name in chosen or OPENRLHF_FLAGS:
        if name == "batch_inference":
            for task, ours in (("generate_vllm", "megarlhf generate"), ("rm", "megarlhf score, megarlhf select")):
                print(f"\nbatch_inference --eval_task {task} of OpenRLHF, {ours}:")
                _print_flags({flag: task_meaning(flag, task.split("_")[0]) for flag in OPENRLHF_FLAGS[name]})
        else:
            options = options_of(PROGRAMS[name])
            print(f"\n{_THEIRS.get(name, f'train_{name}')} of OpenRLHF, megarlhf {name}:")
            _print_flags({flag: meaning(flag, options) for flag in OPENRLHF_FLAGS[name]})
    return 0


def _print_flags(meanings: Mapping[str, str]) -> None:
    for flag, text in meanings.items():
        print(f"  --{flag:38} {text}")


def task_meaning(flag: str, task: str) -> str:
    """What a flag of batch_inference means to one of its tasks, generate or rm."""
    if flag == "eval_task":
        return "which of the two"
    if flag in REFUSED[task]:
        return f"refused: {REFUSED[task][flag]}"
    if task == "rm" and flag in SELECTING:
        return "the same, of megarlhf score or select"
    if flag in UNREAD[task]:
        return f"{UNREAD[task][flag]}; no effect"
    renamed = RENAMED[task].get(flag, flag)
    found = meaning(renamed, options_of(_TASKS[task]))
    return found if renamed == flag else f"--{renamed}"


if __name__ == "__main__":
    sys.exit(main())
