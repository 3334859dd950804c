"""`megarlhf COMMAND ...`, the same programs as the modules of this folder."""

import sys
from collections.abc import Sequence

from megarlhf import __version__

_COMMANDS = {
    "convert": "checkpoints between Hugging Face and Megatron-Core: hf-to-megatron, megatron-to-hf",
    "inspect": "what a checkpoint holds",
    "ppo": "RL from a reward: PPO, REINFORCE(++), RLOO, GRPO",
    "sft": "supervised fine-tuning",
    "parity": "compare a layout with one process",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a program; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command == "--version":
        print(__version__)
        return 0
    if command == "ppo":
        from megarlhf.cli.train_ppo import main as run
    elif command == "sft":
        from megarlhf.cli.train_sft import main as run
    elif command == "parity":
        from megarlhf.cli.parity import main as run
    elif command == "convert":
        from megarlhf.cli.convert import main as run
    elif command == "inspect":
        from megarlhf.cli.inspect import main as run
    else:
        lines = "\n".join(f"  {name:7} {text}" for name, text in _COMMANDS.items())
        known = command in ("-h", "--help")
        usage = f"usage: megarlhf COMMAND [flags]\n\n{lines}\n\nmegarlhf COMMAND --help lists the flags."
        print(usage, file=sys.stdout if known else sys.stderr)
        if not known:
            print(f"megarlhf: error: no command {command!r}", file=sys.stderr)
        return 0 if known else 2
    return run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
