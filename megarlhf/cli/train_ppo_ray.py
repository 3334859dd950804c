"""RL from a reward with Ray: `megarlhf ppo` or `python -m megarlhf.cli.train_ppo_ray`."""

import sys

from megarlhf.cli.programs import PPO_IN_RAY as main

if __name__ == "__main__":
    sys.exit(main())
