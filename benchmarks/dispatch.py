"""Rows, bytes and time of one MoE layer's dispatch: AdaMoE, with and without de-duplication, against Megatron's own.

Run it on two or more ranks::

    torchrun --nproc-per-node 2 benchmarks/dispatch.py --json results.json

Every variant sees the same tokens. Rows and bytes are what one forward dispatch hands to the collectives for *other*
ranks, taken from the collectives' own arguments, Megatron's among them; bytes include combine weights and whatever
tells the receivers what comes. The floor is the number of distinct (token, remote rank) pairs in the routing map.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
import torch.distributed as dist
from common import (
    BenchmarkParser,
    Pairs,
    adamoe_moe,
    baseline_moe,
    build_layer,
    forward_backward,
    hidden_states,
    in_pairs,
    markdown,
    ranks,
    report,
)
from megatron.core.tensor_parallel import mappings

from adamoe_dist.console import run_tool
from adamoe_dist.errors import UserError
from adamoe_dist.model import AdaMoELayer
from adamoe_dist.routing import read_vector


def variants(num_experts: int) -> dict[str, dict[str, Any]]:
    """Return the ``moe`` sections compared for n true experts; the first is the baseline."""
    n = num_experts
    found = {
        "Megatron top-2": baseline_moe(n, 2),
        "m=0 k=2": adamoe_moe(n, 0, 2),
        f"m={n} k=3, a row a pair": {**adamoe_moe(n, n, 3), "dispatcher": {"deduplicate": False}},
        f"m={n} k=3": adamoe_moe(n, n, 3),
        f"m={3 * n} k=4": adamoe_moe(n, 3 * n, 4),
    }
    if n >= 64:
        found["Megatron top-8"] = baseline_moe(n, 8)
        found[f"m={n} k=8, a row a pair"] = {**adamoe_moe(n, n, 8), "dispatcher": {"deduplicate": False}}
        found[f"m={n} k=8"] = adamoe_moe(n, n, 8)
    return found


@dataclass
class Sent:
    """What collectives were handed for other ranks."""

    rows: int = 0
    bytes: int = 0


@contextlib.contextmanager
def watch_collectives(hidden: int) -> Iterator[Sent]:
    """Count what all-to-alls and all-gathers send while this context is open.

    A row is a vector of H numbers in an all-to-all with split sizes; every byte counts that is meant for another rank.
    """
    sent = Sent()
    all_to_all, all_gather = dist.all_to_all_single, mappings.dist_all_gather_func

    def counted_all_to_all(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        **keywords: Any,
    ) -> Any:
        size, here = dist.get_world_size(group), dist.get_rank(group)
        splits = [input.shape[0] // size] * size if input_split_sizes is None else list(input_split_sizes)
        assert sum(splits) == input.shape[0], f"splits {splits} of {input.shape[0]} entries"
        remote = sum(splits) - splits[here]
        if input.dim() == 2 and input.shape[1] == hidden and input.is_floating_point():
            sent.rows += remote
        sent.bytes += remote * input[:1].numel() * input.element_size()
        return all_to_all(output, input, output_split_sizes, input_split_sizes, group=group, **keywords)

    def counted_all_gather(output: torch.Tensor, input: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent.bytes += (dist.get_world_size(keywords.get("group")) - 1) * input.numel() * input.element_size()
        return all_gather(output, input, *arguments, **keywords)

    with (
        mock.patch.object(dist, "all_to_all_single", counted_all_to_all),
        mock.patch.object(mappings, "dist_all_gather_func", counted_all_gather),
    ):
        yield sent


@dataclass
class Count:
    """Of one forward dispatch, summed over all ranks, a token."""

    load: float
    rows: float
    floor: float
    bytes: float


def count(layer: AdaMoELayer, hidden: torch.Tensor) -> Count:
    """Count one forward dispatch; the layer's own counter must agree with the collectives. Collective."""
    layer.counters.reset()
    maps: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda _, __, outputs: maps.append(outputs[1]))
    with watch_collectives(hidden.shape[-1]) as forward, _stop_before_combine(layer):
        layer(hidden)
    hook.remove()
    counted = read_vector(layer.counters.vector(torch.device("cpu")), layer.counters.num_experts)[0]["dispatch_rows"]
    if counted != forward.rows:
        raise AssertionError(f"the layer counted {counted} rows, {forward.rows} were sent")
    tokens, world_size = maps[0].shape[0], dist.get_world_size()
    remote_TG = maps[0].view(tokens, world_size, -1).any(-1)
    remote_TG[:, dist.get_rank()] = False
    sums = torch.tensor([int(maps[0].sum()), forward.rows, int(remote_TG.sum()), forward.bytes], dtype=torch.float64)
    dist.all_reduce(sums)
    return Count(*(sums / (tokens * world_size)).tolist())


@contextlib.contextmanager
def _stop_before_combine(layer: AdaMoELayer) -> Iterator[None]:
    """Let a forward end with the dispatch: what comes back is as many rows again and is not counted."""

    class Dispatched(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Dispatched

    with mock.patch.object(layer.token_dispatcher, "combine_preprocess", stop), contextlib.suppress(Dispatched):
        yield


def measure(num_experts: int, options: Any) -> list[dict[str, Any]]:
    """Count and time every variant of n experts beside the first. Collective."""
    hidden = hidden_states(options.tokens, options.hidden, seed=100 + dist.get_rank())
    baseline: AdaMoELayer | None = None
    records: list[dict[str, Any]] = []
    for name, moe in variants(num_experts).items():
        layer = build_layer({**moe, "expert_hidden_size": options.expert_hidden}, options.hidden)
        baseline = baseline or layer
        pairs = _paired(layer, baseline, hidden, options.pairs)
        counted = count(layer, hidden)
        records.append({"num_experts": num_experts, "variant": name, **asdict(counted), **pairs.record()})
    return records


def _paired(layer: AdaMoELayer, baseline: AdaMoELayer, hidden: torch.Tensor, pairs: int) -> Pairs:
    return in_pairs(lambda: forward_backward(layer, hidden), lambda: forward_backward(baseline, hidden), pairs)


def table(records: list[dict[str, Any]]) -> str:
    """Return the table of one number of experts."""
    first = records[0]
    header = (
        f"n={first['num_experts']}",
        "true experts a token",
        "rows a token",
        "floor",
        "rows / floor",
        f"rows / {first['variant']}",
        "bytes a token",
        f"time / {first['variant']} (range)",
    )
    rows = [
        (
            record["variant"],
            f"{record['load']:.2f}",
            f"{record['rows']:.3f}",
            f"{record['floor']:.3f}",
            f"{record['rows'] / record['floor']:.2f}" if record["floor"] else "-",
            f"{record['rows'] / first['rows']:.2f}" if first["rows"] else "-",
            f"{record['bytes']:.0f}",
            f"{record['ratio_median']:.2f} ({record['ratio_low']:.2f}-{record['ratio_high']:.2f})",
        )
        for record in records
    ]
    return markdown(header, rows)


def main(argv: list[str]) -> int:
    """Measure every variant and print the tables on rank 0."""
    parser = BenchmarkParser("Rows, bytes and time of one MoE layer's dispatch; run it under torchrun on 2 ranks or 4.")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="n: true experts; a table for each")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank")
    parser.add_argument("--hidden", type=int, default=256, help="H")
    parser.add_argument("--expert-hidden", type=int, default=512, help="inner width of an expert")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of a variant and the baseline")
    options = parser.parse_args(argv)
    with ranks() as launch:
        for num_experts in options.experts:
            if num_experts % launch.world_size:
                raise UserError(f"--experts {num_experts} cannot be spread over {launch.world_size} ranks")
        records = [measure(num_experts, options) for num_experts in options.experts]
        if launch.rank == 0:
            report(options, [table(rows) for rows in records], {"rows": [row for rows in records for row in rows]})
    return 0


if __name__ == "__main__":
    run_tool(main)
