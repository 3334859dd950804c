"""Talk to a model on a terminal, or from a file of messages: `megarlhf chat`.

megarlhf chat --pretrain runs/ppo/hf --apply_chat_template
"""

import sys

from megarlhf.cli.programs import CHAT as main

if __name__ == "__main__":
    sys.exit(main())
