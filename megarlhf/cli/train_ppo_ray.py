"""RL from a reward with Ray: `megarlhf ppo` or `python -m megarlhf.cli.train_ppo_ray`."""

import sys
from collections.abc import Sequence

from megarlhf.cli import train_ppo


def main(argv: Sequence[str] | None = None) -> int:
    """See train_ppo.main."""
    return train_ppo.main(argv, ray=True)


if __name__ == "__main__":
    sys.exit(main())
