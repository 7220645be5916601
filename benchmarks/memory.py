"""Memory of a rank by ZeRO stage, with an offloaded optimizer, and by activation recompute.

Each row is a run of its own in fresh processes: data parallel over ``--ranks`` (with ``--expert`` experts are spread)::

    python benchmarks/memory.py
    python benchmarks/memory.py --ranks 4 --expert 2

*State* is the live tensors between the last backward pass and the step, by what they are for: all that the stage has to
hold. *Peaks* are of the second step: of the forward and backward passes, and of the optimizer's step. On a CPU they are
the resident memory's above what the process had before the model; what is freed goes back to the system here, other
than in training. On CUDA they are the most that was allocated. Beside them stands what ``--dry-run`` plans for weights,
gradients and optimizer; activations and communication come on top. For recompute the sequences are longer, so that
activations show.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import BenchmarkParser, markdown, report
from processes import forget_peak, free_at_once, memory_now, peak, run_ranks

from adamoe_dist import platform
from adamoe_dist.config import Resolved, config_from_dict, resolve
from adamoe_dist.console import run_tool
from adamoe_dist.model import build_model
from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups, live_bytes
from adamoe_dist.planning import count_parameters, rank_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 8192
STEPS = 2
MEASURED = ("weights", "gradients", "optimizer state", "peak of passes", "peak of step", "planned state")


@dataclass(frozen=True)
class Case:
    """One run."""

    stage: int
    precision: str = "fp32"
    offload: bool = False
    recompute: str = "none"
    length: int = 64


@dataclass(frozen=True)
class Row:
    """What was seen, the largest of the ranks, and what was planned, in MiB."""

    case: Case
    weights: float
    gradients: float
    optimizer: float
    peak_passes: float
    peak_step: float
    planned: float


def cases(precisions: list[str], length: int) -> list[Case]:
    """Return the rows: stages and offload in each precision, then recompute."""
    stages = [Case(stage, precision) for precision in precisions for stage in range(4)]
    offloaded = [Case(2, precision, offload=True) for precision in precisions]
    recomputed = [Case(1, precisions[0], recompute=kind, length=length) for kind in ("none", "selective", "full")]
    return stages + offloaded + recomputed


def tree_of(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration of a row."""
    return {
        "model": {
            "hidden_size": options.hidden,
            "num_layers": options.layers,
            "num_attention_heads": 4,
            "sequence_length": case.length,
        },
        "moe": {"num_experts": 8, "num_null_experts": 8, "top_k": 3, "expert_hidden_size": options.hidden},
        "parallel": {"expert": options.expert},
        "zero": {"stage": case.stage, "offload_optimizer": case.offload},
        "optimizer": {"implementation": "torch"},
        "data": {"tokenizer": "none", "train": [{"path": "none"}]},
        "train": {"global_batch_size": 4 * options.ranks, "micro_batch_size": 2, "recompute": case.recompute},
    }


def train_and_measure(case: Case, options: argparse.Namespace) -> Row:
    """Train two steps on this rank and return what the second took. Collective."""
    launch = Launch.from_environment()
    config = config_from_dict(tree_of(case, options))
    resolved = resolve(config, launch.world_size)
    platform.limit_threads()
    initialize_groups(launch, resolved)
    free_at_once()
    before, device = memory_now(), platform.device(launch.local_rank)
    dtype = DTYPES[case.precision]
    model = build_model(config, resolved, VOCABULARY, dtype, platform.is_cuda()).model
    engine = TrainingEngine(model, config, resolved, dtype, config.moe.num_experts)
    engine.train()
    for step in range(STEPS):  # building the model and the first step's lazy state are past in the last
        forget_peak()
        _accumulate(engine, torch.Generator().manual_seed(step), case.length, resolved, device)
        peak_passes, live = peak() - before, live_bytes(engine)
        forget_peak()
        engine.step()
        peak_step = peak() - before
    numbers = [live.weights, live.gradients, live.optimizer, peak_passes, peak_step]
    largest = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    parameters = count_parameters(config, config.padded_vocab_size(VOCABULARY))
    planned = rank_memory(config, resolved, parameters, case.precision)
    engine.close()
    destroy_groups()
    on_host = 0.0 if platform.is_cuda() else planned.host
    weights, gradients, optimizer, peak_passes, peak_step = (largest / 2**20).tolist()
    return Row(case, weights, gradients, optimizer, peak_passes, peak_step, (planned.total + on_host) / 2**20)


def _accumulate(
    engine: TrainingEngine, generator: torch.Generator, length: int, resolved: Resolved, device: torch.device
) -> None:
    engine.start_step(resolved.micro_batches_per_rank)
    for _ in range(resolved.micro_batches_per_rank):
        shape = (resolved.micro_batch_size, length + 1)
        tokens = torch.randint(VOCABULARY, shape, generator=generator).to(device)
        engine.backward(engine(tokens).mean())


def run_case(case: Case, options: argparse.Namespace) -> Row:
    """Run a case in processes of its own and return rank 0's answer."""
    size = ["--ranks", options.ranks, "--expert", options.expert, "--hidden", options.hidden]
    arguments = [*map(str, [*size, "--layers", options.layers]), "--case", json.dumps(asdict(case))]
    answer = json.loads(run_ranks(__file__, arguments, options.ranks))
    return Row(**{**answer, "case": case})


def main(argv: list[str]) -> int:
    """Measure all rows and print them."""
    parser = BenchmarkParser("Memory of a rank, in MiB, by ZeRO stage, offload and recompute.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--expert", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="sequence length of the rows of recompute")
    parser.add_argument("--precisions", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        row = train_and_measure(Case(**json.loads(options.case)), options)
        print(json.dumps(asdict(row)), flush=True)
        return 0
    rows = [run_case(case, options) for case in cases(options.precisions, options.length)]
    header = ["stage", "precision", "optimizer", "recompute", "length", *MEASURED]
    table = markdown(
        header,
        [
            [
                row.case.stage,
                row.case.precision,
                "offloaded" if row.case.offload else "on device",
                row.case.recompute,
                row.case.length,
                *(f"{value:.0f}" for name, value in asdict(row).items() if name != "case"),
            ]
            for row in rows
        ],
    )
    report(options, [table], {"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    run_tool(main)
