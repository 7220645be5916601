"""Time and peak memory of one MoE layer against the share of null slots, which is forced.

The router is replaced by fixed maps: every token draws k distinct true experts, and exactly the given share of all
tokens' slots, nested from share to share, is null. What remains is dispatch, experts and combine, forward and backward.
Each time is taken beside share 0; work that no null slot causes would take 1 - share of it.

The second table takes a small language model's whole forward and backward at null shares of 0, 0.1 and 0.9, the
quantity of a published sweep on TPUs (marin-community/marin, issue 2844): tokens a second gained.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import (
    BenchmarkParser,
    ForcedRouter,
    adamoe_moe,
    build_layer,
    forward_backward,
    hidden_states,
    in_pairs,
    markdown,
    peak_bytes,
    ranks,
    report,
)

from adamoe_dist import platform
from adamoe_dist.config import config_from_dict, resolve
from adamoe_dist.console import run_tool
from adamoe_dist.errors import UserError
from adamoe_dist.model import LanguageModel, build_model

MARIN = {8: ("5.4-8.2 %", "88-101 %"), 4: ("", "43-57 %"), 2: ("", "23-31 %")}
"""Per k: tokens/s gained from null share 0 to 0.1, and from 0.1 to 0.9, as published."""


@dataclass
class Point:
    """One null share of the layer's sweep."""

    top_k: int
    null_share: float
    load: float
    seconds: float
    ratio_median: float
    ratio_low: float
    ratio_high: float
    deviation: float
    """Time relative to share 0, less 1 - share: what null slots still cost."""
    peak_bytes: int


def forced_map(tokens: int, num_experts: int, top_k: int, null_share: float) -> torch.Tensor:
    """Return a map (T, E) in which exactly ``null_share`` of the T x k slots is empty; higher shares empty more."""
    generator = torch.Generator().manual_seed(7)
    chosen_TK = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    order = torch.randperm(tokens * top_k, generator=generator)
    null_TK = torch.zeros(tokens * top_k, dtype=torch.bool)
    null_TK[order[: round(null_share * tokens * top_k)]] = True
    empty_TE = torch.zeros(tokens, num_experts, dtype=torch.bool)
    return empty_TE.scatter(1, chosen_TK, ~null_TK.view(tokens, top_k)).to(platform.device())


def sweep(options: Any) -> list[Point]:
    """Measure every share of one layer beside share 0."""
    k, n = options.top_k, options.experts
    layer = build_layer({**adamoe_moe(n, n, k), "expert_hidden_size": options.expert_hidden}, options.hidden)
    hidden = hidden_states(options.tokens, options.hidden)
    routers = {share: ForcedRouter(forced_map(options.tokens, n, k, share)) for share in options.shares}
    reference = routers.get(0.0) or ForcedRouter(forced_map(options.tokens, n, k, 0.0))

    def run(router: ForcedRouter) -> None:
        layer.router = router
        forward_backward(layer, hidden)

    points = []
    for share, router in routers.items():
        times = in_pairs(partial(run, router), partial(run, reference), options.pairs, warm_up=1).record()
        layer.router = router
        points.append(
            Point(
                top_k=k,
                null_share=share,
                load=float(router.routing_map.sum()) / options.tokens,
                seconds=times["seconds"],
                ratio_median=times["ratio_median"],
                ratio_low=times["ratio_low"],
                ratio_high=times["ratio_high"],
                deviation=times["ratio_median"] - (1 - share),
                peak_bytes=peak_bytes(layer, hidden),
            )
        )
    return points


def gains(top_k: int, options: Any) -> dict[str, Any]:
    """Return the whole model's gain in tokens a second from null share 0 to 0.1 and from 0.1 to 0.9."""
    model = _model(top_k, options)
    tokens = torch.randint(options.vocabulary, (options.tokens // options.sequence, options.sequence + 1))
    tokens = tokens.to(platform.device())
    routed = tokens.shape[0] * options.sequence
    routers = {s: ForcedRouter(forced_map(routed, options.experts, top_k, s)) for s in (0.0, 0.1, 0.9)}

    def run(share: float) -> None:
        for layer in model.moe_layers:
            layer.router = routers[share]
        model.zero_grad(set_to_none=True)
        model(tokens).mean().backward()

    first = in_pairs(lambda: run(0.0), lambda: run(0.1), options.pairs, warm_up=1).record()
    rest = in_pairs(lambda: run(0.1), lambda: run(0.9), options.pairs, warm_up=1).record()
    return {"top_k": top_k, "first_tenth": first, "tenth_to_nine_tenths": rest}


def _model(top_k: int, options: Any) -> LanguageModel:
    moe = {**adamoe_moe(options.experts, options.experts, top_k), "expert_hidden_size": options.expert_hidden}
    config = config_from_dict(
        {
            "model": {"hidden_size": options.hidden, "num_layers": 2, "sequence_length": options.sequence},
            "moe": moe,
            "data": {"tokenizer": "none", "train": [{"path": "none"}]},
        }
    )
    built = build_model(config, resolve(config, 1), options.vocabulary, torch.float32, platform.is_cuda())
    return built.model.to(platform.device()).train()


def sweep_table(points: list[Point]) -> str:
    """Return the table of the layer's sweep."""
    header = (
        "null share",
        "load",
        "ms",
        "time / share 0 (range)",
        "1 - share",
        "deviation",
        "peak MiB",
        "peak / share 0",
    )
    first = points[0].peak_bytes
    rows = [
        (
            f"{p.null_share:.1f}",
            f"{p.load:.2f}",
            f"{p.seconds * 1e3:.1f}",
            f"{p.ratio_median:.3f} ({p.ratio_low:.3f}-{p.ratio_high:.3f})",
            f"{1 - p.null_share:.1f}",
            f"{p.deviation:+.3f}",
            f"{p.peak_bytes / 2**20:.1f}",
            f"{p.peak_bytes / first:.3f}",
        )
        for p in points
    ]
    return markdown(header, rows)


def gains_table(records: list[dict[str, Any]]) -> str:
    """Return the table of the whole model's gains beside the published ones."""
    rows = []
    for record in records:
        published = MARIN.get(record["top_k"], ("", ""))
        cells = [_gain(record[part]) for part in ("first_tenth", "tenth_to_nine_tenths")]
        rows.append((record["top_k"], cells[0], published[0] or "-", cells[1], published[1] or "-"))
    return markdown(("k", "0 to 0.1: tokens/s (range)", "marin", "0.1 to 0.9: tokens/s (range)", "marin"), rows)


def _gain(pair: dict[str, float]) -> str:
    median, low, high = (100 * (pair[f"ratio_{part}"] - 1) for part in ("median", "low", "high"))
    return f"{median:+.1f} % ({low:+.1f} to {high:+.1f})"


def main(argv: list[str]) -> int:
    """Measure and print both tables."""
    parser = BenchmarkParser("Time and peak memory of one MoE layer against a forced share of null slots; one process.")
    parser.add_argument("--tokens", type=int, default=2560, help="tokens a pass")
    parser.add_argument("--hidden", type=int, default=512, help="H")
    parser.add_argument("--experts", type=int, default=16, help="n: true experts")
    parser.add_argument("--expert-hidden", type=int, default=256, help="inner width of an expert")
    parser.add_argument("--top-k", type=int, default=8, help="k of the layer's sweep")
    parser.add_argument("--shares", type=float, nargs="+", default=[s / 10 for s in range(10)], help="null shares")
    parser.add_argument("--model-top-k", type=int, nargs="*", default=[8, 4, 2], help="k of the whole model's gains")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a sequence of the whole model")
    parser.add_argument("--vocabulary", type=int, default=512, help="vocabulary of the whole model")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of each point")
    options = parser.parse_args(argv)
    if not all(0 <= share < 1 for share in options.shares):
        raise UserError(f"--shares {options.shares} must be at least 0 and below 1")
    if options.tokens % options.sequence:
        raise UserError(f"--tokens {options.tokens} is not a multiple of --sequence {options.sequence}")
    for share in options.shares:
        slots = share * options.tokens * options.top_k
        if abs(slots - round(slots)) > 1e-6:
            raise UserError(f"--tokens {options.tokens} x --top-k {options.top_k} slots have no exact share {share}")
    with ranks():
        points = sweep(options)
        model = [gains(top_k, options) for top_k in options.model_top_k]
        tables = [sweep_table(points)] + ([gains_table(model)] if model else [])
        report(options, tables, {"layer": [asdict(point) for point in points], "model": model})
    return 0


if __name__ == "__main__":
    run_tool(main)
