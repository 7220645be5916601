"""Rows, bytes and time of one MoE layer: AdaMoE, with and without de-duplication, against Megatron's own top-2.

Run it on two or more ranks::

    torchrun --nproc-per-node 2 benchmarks/dispatch.py --json results.json

Every variant sees the same tokens. Rows and bytes are exact counts of what leaves a rank in one forward dispatch; the
floor is the number of distinct (token, remote rank) pairs, counted from the routing map. Times are forward and
backward; the ratio to the baseline is taken pair by pair, variant and baseline one after the other, and its median and
range are given. CPU times say nothing about GPUs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from adamoe_dist import platform

platform.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from adamoe_dist.config import Config, config_from_dict, resolve  # noqa: E402
from adamoe_dist.model import AdaMoELayer, transformer_config  # noqa: E402
from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups  # noqa: E402
from adamoe_dist.routing import read_vector  # noqa: E402


@dataclass
class Row:
    """One line of the table; counts are per token and layer, summed over what all ranks send."""

    variant: str
    load: float
    rows: float
    floor: float
    bytes: float
    ratio_median: float
    ratio_low: float
    ratio_high: float


VARIANTS: dict[str, dict[str, object]] = {
    "Megatron top-2": {
        "num_null_experts": 0,
        "top_k": 2,
        "router": {"type": "topk", "balance": {"type": "none"}},
    },
    "m=0 k=2": {"num_null_experts": 0, "top_k": 2},
    "m=8 k=3, a row a pair": {"num_null_experts": 8, "top_k": 3, "dispatcher": {"deduplicate": False}},
    "m=8 k=3": {"num_null_experts": 8, "top_k": 3},
    "m=24 k=4": {"num_null_experts": 24, "top_k": 4},
}


def build(options: argparse.Namespace, changes: dict[str, object], world_size: int) -> tuple[AdaMoELayer, Config]:
    """Build one layer of a variant, the same weights wherever shapes agree."""
    config = config_from_dict(
        {
            "model": {"hidden_size": options.hidden, "num_layers": 1},
            "moe": {"num_experts": 8, "expert_hidden_size": options.expert_hidden, **changes},
            "data": {"tokenizer": "none", "train": [{"path": "none"}]},
            "train": {"global_batch_size": 2 * world_size},
        }
    )
    torch.manual_seed(1)
    layer = AdaMoELayer(transformer_config(config, resolve(config, world_size), torch.float32, "grouped_mm"))
    layer.set_layer_number(1)
    return layer, config


def pass_once(layer: AdaMoELayer, hidden: torch.Tensor) -> float:
    """Run forward and backward once and return the seconds."""
    layer.counters.reset()
    hidden.grad = None
    started = time.perf_counter()
    layer(hidden)[0].square().mean().backward()
    platform.synchronize()
    return time.perf_counter() - started


def count_floor(layer: AdaMoELayer, hidden: torch.Tensor) -> int:
    """Count distinct (token, remote rank) pairs of this rank's tokens from the routing map itself."""
    with torch.no_grad():
        routing_map = layer.route(hidden)[1]
    ranks = routing_map.view(routing_map.shape[0], dist.get_world_size(), -1).any(-1)
    ranks[:, dist.get_rank()] = False
    return int(ranks.sum())


def measure(name: str, layer: AdaMoELayer, baseline: Callable[[], float], options: argparse.Namespace) -> Row:
    """Measure one variant beside the baseline."""
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    hidden = torch.randn(options.tokens, 1, options.hidden, generator=generator).requires_grad_()
    for _ in range(3):
        pass_once(layer, hidden)
        baseline()
    ratios = []
    for _ in range(options.repeats):
        ratios.append(pass_once(layer, hidden) / baseline())
    vector = layer.counters.vector(torch.device("cpu"))
    sums = torch.cat([vector, torch.tensor([float(count_floor(layer, hidden))], dtype=torch.float64)])
    dist.all_reduce(sums)
    tokens = options.tokens * dist.get_world_size()
    counted, routed = read_vector(sums[:-1], layer.counters.num_experts)
    return Row(
        variant=name,
        load=int(routed.true_slots) / tokens,
        rows=counted["dispatch_rows"] / tokens,
        floor=float(sums[-1]) / tokens,
        bytes=counted["dispatch_bytes"] / tokens,
        ratio_median=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


def main() -> None:
    """Measure every variant and print the table on rank 0."""
    parser = argparse.ArgumentParser(description="Rows, bytes and time of one MoE layer.")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--expert-hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    launch = Launch.from_environment()
    probe = config_from_dict(
        {"data": {"tokenizer": "none", "train": [{"path": "none"}]}, "train": {"global_batch_size": launch.world_size}}
    )
    platform.limit_threads()
    initialize_groups(launch, resolve(probe, launch.world_size))
    layers = {name: build(options, changes, launch.world_size)[0] for name, changes in VARIANTS.items()}
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    hidden = torch.randn(options.tokens, 1, options.hidden, generator=generator).requires_grad_()
    reference = layers["Megatron top-2"]
    table = [measure(name, layer, lambda: pass_once(reference, hidden), options) for name, layer in layers.items()]
    if launch.rank == 0:
        show(table, options)
    destroy_groups()


def show(table: list[Row], options: argparse.Namespace) -> None:
    """Print the table and write the JSON."""
    print("| layer | true experts a token | rows a token | floor | bytes a token | time / Megatron top-2 (range) |")
    print("|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.variant} | {row.load:.2f} | {row.rows:.3f} | {row.floor:.3f} | {row.bytes:.0f} | "
            f"{row.ratio_median:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f}) |"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in table], indent=2) + "\n")


if __name__ == "__main__":
    main()
