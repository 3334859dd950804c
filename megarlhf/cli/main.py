"""`megarlhf COMMAND ...`, the same programs as the modules of this folder."""

import sys
from collections.abc import Sequence
from importlib import import_module

from megarlhf import __version__

_COMMANDS = {  # name -> module of this folder, and what it does
    "convert": ("convert", "checkpoints between Hugging Face and Megatron-Core: hf-to-megatron, megatron-to-hf"),
    "merge_lora": ("merge_lora", "a model and its LoRA adapter made into one checkpoint"),
    "inspect": ("inspect", "what a checkpoint holds"),
    "preprocess": ("preprocess", "a .jsonl file as Megatron's indexed data set (.bin, .idx)"),
    "ppo": ("train_ppo_ray", "RL from a reward: PPO, REINFORCE(++), RLOO, GRPO"),
    "rehearse": ("rehearse", "a run of any size without GPUs: every process's device, groups and weights"),
    "sft": ("train_sft", "supervised fine-tuning"),
    "prm": ("train_prm", "process reward model: a judgement of each step of a solution"),
    "dpo": ("train_dpo", "preference optimisation of pairs: DPO, cDPO, IPO"),
    "kto": ("train_kto", "preference optimisation of labelled answers"),
    "kd": ("train_kd", "knowledge distillation from a teacher"),
    "rm": ("train_rm", "reward model from pairs of answers"),
    "generate": ("generate", "responses to prompts, into a file"),
    "score": ("score", "rewards of a file's samples"),
    "select": ("select", "training data of scored samples"),
    "iterate": ("iterate", "rejection sampling, iterative DPO, conditional SFT: rounds of all of these and training"),
    "chat": ("interactive_chat", "talk to a model"),
    "serve_rm": ("serve_rm", "a reward over HTTP, for --remote_rm_url here and in OpenRLHF"),
    "eval": ("evaluate", "accuracy and pass@k of a model on held-out prompts"),
    "flags": ("flags", "what each flag of OpenRLHF 0.5.3 means here"),
    "parity": ("parity", "compare a layout with one process"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a program; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command == "--version":
        print(__version__)
        return 0
    name = command.replace("-", "_")
    if name in _COMMANDS:
        return int(import_module(f"megarlhf.cli.{_COMMANDS[name][0]}").main(arguments[1:]))
    lines = "\n".join(f"  {name:10} {text}" for name, (_, text) in _COMMANDS.items())
    known = command in ("-h", "--help")
    usage = f"usage: megarlhf COMMAND [flags]\n\n{lines}\n\nmegarlhf COMMAND --help lists the flags."
    print(usage, file=sys.stdout if known else sys.stderr)
    if not known:
        print(f"megarlhf: error: no command {command!r}", file=sys.stderr)
    return 0 if known else 2


if __name__ == "__main__":
    sys.exit(main())
