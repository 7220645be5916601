"""launch/pretrain.py with a clock around the expert exchange; benchmarks/two_nodes.py starts it on each node.

The ranks meet before each all-to-all, so that waiting for a rank that is still computing is not taken for
communication. The times are written as JSON to the file that ``EXCHANGE_TIMES`` names: seconds of each call.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adamoe_dist.training import pretrain


def main(argv: list[str]) -> int:
    """Train as launch/pretrain.py does, and leave the times behind."""
    calls: list[float] = []
    all_to_all: Any = dist.all_to_all_single

    def timed(*arguments: Any, group: dist.ProcessGroup | None = None, **keywords: Any) -> Any:
        dist.barrier(group=group)
        started = time.perf_counter()
        handle = all_to_all(*arguments, group=group, **keywords)
        if handle is not None:  # an asynchronous call: its time is that of the transfer, not of the issue
            handle.wait()
        calls.append(time.perf_counter() - started)
        return handle

    dist.all_to_all_single = timed
    code = pretrain(argv, Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml")
    Path(os.environ["EXCHANGE_TIMES"]).write_text(json.dumps(calls), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
