"""Talk to a model on a terminal, or from a file of messages: `megarlhf chat`.

megarlhf chat --pretrain runs/ppo/hf --apply_chat_template
"""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.checks import check_chat, raise_if
from megarlhf.config.command_line import parse, to_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check and talk; returns the exit status."""
    config, dry_run = parse(ChatConfig, list(sys.argv[1:] if argv is None else argv), prog="megarlhf chat")
    return report_errors("megarlhf chat", lambda: _run(config, dry_run=dry_run))


def _run(config: ChatConfig, *, dry_run: bool) -> int:
    raise_if(check_chat(config))
    from megarlhf.cli.chat import prepare, talk  # PyTorch and vLLM take seconds: mistakes are told before

    prepared = prepare(config)
    if dry_run:
        print(to_yaml(config))
        return 0
    return talk(config, prepared)


if __name__ == "__main__":
    sys.exit(main())
