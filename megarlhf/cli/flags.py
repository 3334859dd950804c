"""`megarlhf flags`: what each flag of OpenRLHF 0.5.3's supervised programs means here."""

import sys
from collections.abc import Sequence

from megarlhf.config.command_line import options_of
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.openrlhf_flags import OPENRLHF_FLAGS, meaning
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, SFTConfig, SupervisedConfig

_CONFIGS: tuple[type[SupervisedConfig], ...] = (SFTConfig, RMConfig, PRMConfig, DPOConfig, KTOConfig, KDConfig)
PROGRAMS = {config.program: config for config in _CONFIGS}
_USAGE = "usage: megarlhf flags [sft|rm|prm|dpo|kto|kd ...]\n\nWhat each flag of OpenRLHF 0.5.3's programs means here."


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of these programs, or of all; returns the exit status."""
    chosen = list(sys.argv[1:] if argv is None else argv)
    if "--help" in chosen or "-h" in chosen:
        print(_USAGE)
        return 0
    if unknown := [name for name in chosen if name not in PROGRAMS]:
        print(f"megarlhf flags: error: no program {unknown[0]!r}; they are {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    for name in chosen or PROGRAMS:
        options = options_of(PROGRAMS[name])
        print(f"\ntrain_{name} of OpenRLHF, megarlhf {name}:")
        for flag in OPENRLHF_FLAGS[name]:
            print(f"  --{flag:38} {meaning(flag, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
