"""What a record costs: the counts of all layers, their scalars in TensorBoard and as CSV files, and the pictures."""

import tempfile
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import BenchmarkParser, markdown, ranks, report, seconds, show_range

from adamoe_dist.config import config_from_dict
from adamoe_dist.console import run_tool
from adamoe_dist.routing import SUMS, read_vector, score_entropy
from adamoe_dist.training.metrics import RoutingRecord, routing_record
from adamoe_dist.training.writers import TAGS, Board

Layers = dict[int, RoutingRecord]


def records(num_layers: int, num_experts: int, top_k: int) -> Layers:
    """Return the records of layers with random counts, from vectors of sums as the counters give them."""
    sums_LS = 1e6 * torch.rand(num_layers, len(SUMS), dtype=torch.float64)
    counts_LC = torch.randint(1, 5000, (num_layers, top_k + 1 + num_experts)).double()
    vectors = torch.cat([sums_LS, counts_LC], dim=1)
    return {number: routing_record(*read_vector(vector, num_experts), top_k) for number, vector in enumerate(vectors)}


def writing(folder: str, layers: Layers, **monitor: Any) -> Callable[[], None]:
    """Return what writes one record after the other with these keys of ``monitor``."""
    board = Board(config_from_dict({"run": {"dir": folder}, "monitor": monitor}), 0)
    step = 0

    def write() -> None:
        nonlocal step
        step += 1
        board.write({**dict.fromkeys(TAGS, 1.0), "step": step}, layers)

    write()  # whatever the first one prepares
    return write


def measure(
    layers: Layers, repeats: int, make: Callable[[], object], logits_TA: torch.Tensor
) -> dict[str, list[float]]:
    """Return the seconds of each part, once for each repetition."""
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], object]] = {
            "counts to records": make,
            "scalars, TensorBoard": writing(f"{folder}/a", layers, image_interval=None),
            "scalars, CSV too": writing(f"{folder}/b", layers, image_interval=None, csv=True),
            "scalars and pictures": writing(f"{folder}/c", layers, image_interval=1),
            "entropy of a layer's scores": lambda: score_entropy(logits_TA),
        }
        return {name: [seconds(work) for _ in range(repeats)] for name, work in parts.items()}


def main(argv: list[str]) -> int:
    """Measure and print what a record costs."""
    parser = BenchmarkParser("Milliseconds of one record and its pictures, on rank 0; one process.")
    parser.add_argument("--layers", type=int, default=24, help="MoE layers")
    parser.add_argument("--experts", type=int, default=64, help="n: true experts, and as many null experts")
    parser.add_argument("--top-k", type=int, default=8, help="k")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the entropy")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each part")
    options = parser.parse_args(argv)
    sizes = (options.layers, options.experts, options.top_k)
    with ranks():
        times = measure(
            records(*sizes),
            options.repeats,
            lambda: records(*sizes),
            torch.randn(options.tokens, 2 * options.experts),
        )
        rows = [(name, show_range([1e3 * value for value in values], 2)) for name, values in times.items()]
        size = f"{options.layers} layers, n = {options.experts}, k = {options.top_k}"
        report(options, [markdown((size, "ms, median (range)"), rows)], {"seconds": times})
    return 0


if __name__ == "__main__":
    run_tool(main)
