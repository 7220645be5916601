"""Fine-tune an AdaMoE model: ``deepspeed launch/finetune.py checkpoint.load_weights=DIR section.key=value ...``."""

import sys
from pathlib import Path

from adamoe_dist.training import finetune

if __name__ == "__main__":
    sys.exit(finetune(sys.argv[1:], Path(__file__).resolve().parent.parent / "configs" / "finetune.yaml"))
