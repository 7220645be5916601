"""Pre-train an AdaMoE language model: ``deepspeed launch/pretrain.py --config FILE section.key=value ...``."""

import sys
from pathlib import Path

from adamoe_dist.training import pretrain

if __name__ == "__main__":
    sys.exit(pretrain(sys.argv[1:], Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"))
