"""`python -m moe_lvlm` is `moe-lvlm`: what launchers such as torchrun start."""

import sys

from moe_lvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
