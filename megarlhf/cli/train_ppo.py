"""RL from a reward on this machine, without Ray: `python -m megarlhf.cli.train_ppo` or `megarlhf ppo --no_ray`."""

import sys

from megarlhf.cli.programs import PPO as main

if __name__ == "__main__":
    sys.exit(main())
