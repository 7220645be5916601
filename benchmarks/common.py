"""What the benchmarks share: one layer, times in pairs, peak memory, tables and where they come from.

Importing this module prepares the process for Megatron-core, so a benchmark imports it before anything of Megatron's.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform as host
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adamoe_dist import platform

platform.prepare()

import torch  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402

from adamoe_dist.config import Config, Resolved, config_from_dict, resolve  # noqa: E402
from adamoe_dist.console import ToolParser, say  # noqa: E402
from adamoe_dist.experts import choose_kernel  # noqa: E402
from adamoe_dist.model import AdaMoELayer, transformer_config  # noqa: E402
from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups  # noqa: E402

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformer-engine")
TOPK: dict[str, Any] = {"type": "topk", "balance": {"type": "none"}}
"""The ``moe.router`` section of Megatron's own router."""


def baseline_moe(num_experts: int, top_k: int) -> dict[str, Any]:
    """Return the ``moe`` section of Megatron's own top-k."""
    return {"num_experts": num_experts, "num_null_experts": 0, "top_k": top_k, "router": TOPK}


def adamoe_moe(num_experts: int, num_null_experts: int, top_k: int) -> dict[str, Any]:
    """Return the ``moe`` section of AdaMoE."""
    return {"num_experts": num_experts, "num_null_experts": num_null_experts, "top_k": top_k}


class BenchmarkParser(ToolParser):
    """A benchmark's command line: its own options and ``--json``."""

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.add_argument("--json", type=Path, help="also write the numbers to this file")


@contextlib.contextmanager
def ranks() -> Iterator[Launch]:
    """Start the process groups, expert parallel over all ranks, and leave them at the end."""
    launch = Launch.from_environment()
    platform.limit_threads()
    initialize_groups(launch, _resolved({"num_experts": launch.world_size}, 64, launch.world_size)[1])
    try:
        yield launch
    finally:
        destroy_groups()


def _resolved(moe: dict[str, Any], hidden: int, world_size: int) -> tuple[Config, Resolved]:
    config = config_from_dict(
        {
            "model": {"hidden_size": hidden, "num_layers": 1},
            "moe": moe,
            "data": {"tokenizer": "none", "train": [{"path": "none"}]},
            "train": {"global_batch_size": world_size},
        }
    )
    return config, resolve(config, world_size)


def build_layer(
    moe: dict[str, Any], hidden: int, dtype: torch.dtype = torch.float32, kernel: str = "auto"
) -> AdaMoELayer:
    """Build one training layer on this process's device, the same weights wherever shapes agree.

    Args:
        moe: the ``moe`` section of a configuration.
        hidden: H.
        dtype: of its weights.
        kernel: ``moe.experts.kernel``.
    """
    config, resolved = _resolved(moe, hidden, torch.distributed.get_world_size())
    widths = (hidden, config.moe.expert_hidden_size)
    chosen, _ = choose_kernel(kernel, dtype, platform.is_cuda(), widths)
    torch.manual_seed(1)
    layer = AdaMoELayer(transformer_config(config, resolved, dtype, chosen), layer_number=1)
    layer.set_layer_number(1)
    return layer.to(platform.device(), dtype).train()


def has_transformer_engine() -> bool:
    """Tell whether Megatron's fastest experts are there."""
    try:
        version("transformer-engine")
    except PackageNotFoundError:
        return False
    return platform.is_cuda()


def build_megatron_layer(
    moe: dict[str, Any], hidden: int, dtype: torch.dtype = torch.float32, settings: dict[str, Any] | None = None
) -> tuple[MoELayer, str]:
    """Build Megatron's own MoE layer, nothing of it replaced, and name its experts.

    They are ``TEGroupedMLP`` where Transformer Engine is installed, ``SequentialMLP`` elsewhere. The router's weights
    are those of :func:`build_layer` for the same section; the experts' are Megatron's own draw.

    Args:
        moe: the ``moe`` section, with Megatron's router (:data:`TOPK`).
        hidden: H.
        dtype: of its weights.
        settings: further fields of Megatron's ``TransformerConfig``.
    """
    config, resolved = _resolved(moe, hidden, torch.distributed.get_world_size())
    fast = has_transformer_engine()
    megatron = copy.copy(transformer_config(config, resolved, dtype, "grouped_mm"))
    for name, value in {"moe_grouped_gemm": fast, "params_dtype": dtype, **(settings or {})}.items():
        assert hasattr(megatron, name), f"Megatron's TransformerConfig has no {name}"
        setattr(megatron, name, value)
    spec: Any = get_moe_module_spec(use_te=fast, num_experts=config.moe.num_experts, moe_grouped_gemm=fast)
    slots = spec.keywords["submodules"] if hasattr(spec, "keywords") else spec.submodules
    torch.manual_seed(1)
    layer = MoELayer(megatron, slots, layer_number=1, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    return layer.to(platform.device(), dtype).train(), type(layer.experts).__name__


class ForcedRouter(torch.nn.Module):
    """Stands in a layer's router slot and gives every forward the same weights and map."""

    routing_map: torch.Tensor
    probs: torch.Tensor

    def __init__(self, routing_map_TE: torch.Tensor) -> None:
        super().__init__()
        counts_T1 = routing_map_TE.sum(dim=1, keepdim=True).clamp(min=1)
        self.register_buffer("routing_map", routing_map_TE)
        self.register_buffer("probs", routing_map_TE / counts_T1)

    def forward(self, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(probs (T, E), routing_map (T, E))``; the weights want a gradient, as a real router's do."""
        return self.probs.clone().requires_grad_(torch.is_grad_enabled()), self.routing_map


def hidden_states(tokens: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 100) -> torch.Tensor:
    """Return token vectors (T, 1, H), standard normal, that want a gradient."""
    drawn = torch.randn(tokens, 1, hidden, generator=torch.Generator().manual_seed(seed))
    return drawn.to(platform.device(), dtype).requires_grad_()


def clear_gradients(layer: torch.nn.Module, hidden: torch.Tensor) -> None:
    """Forget the gradients of a layer and its input."""
    hidden.grad = None
    layer.zero_grad(set_to_none=True)


def forward_backward(layer: torch.nn.Module, hidden: torch.Tensor) -> None:
    """Run one layer forward and backward, with its output as cotangent; gradients start anew."""
    clear_gradients(layer, hidden)
    output = layer(hidden)[0]
    output.backward(output.detach())


def seconds(work: Callable[[], object], iterations: int = 1) -> float:
    """Return the time of one call of ``work``, averaged over ``iterations`` of them."""
    platform.synchronize()
    started = time.perf_counter()
    for _ in range(iterations):
        work()
    platform.synchronize()
    return (time.perf_counter() - started) / iterations


@dataclass(frozen=True)
class Pairs:
    """Times of something and of its baseline, taken one right after the other, in seconds."""

    measured: list[float]
    baseline: list[float]

    @property
    def ratios(self) -> list[float]:
        """Measured over baseline, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.measured, self.baseline, strict=True)]

    def record(self) -> dict[str, float]:
        """Return medians and range for the JSON."""
        ratios = self.ratios
        return {
            "seconds": statistics.median(self.measured),
            "baseline_seconds": statistics.median(self.baseline),
            "ratio_median": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "pairs": len(ratios),
        }

    def __str__(self) -> str:
        return show_range(self.ratios)


def in_pairs(
    measured: Callable[[], object], baseline: Callable[[], object], pairs: int, warm_up: int = 2, iterations: int = 1
) -> Pairs:
    """Time two pieces of work in pairs; who goes first alternates, so that a drift favours neither."""
    for _ in range(warm_up):
        measured()
        baseline()
    result = Pairs([], [])
    for pair in range(pairs):
        if pair % 2 == 0:
            result.measured.append(seconds(measured, iterations))
        result.baseline.append(seconds(baseline, iterations))
        if pair % 2 == 1:
            result.measured.append(seconds(measured, iterations))
    return result


def show_range(values: Sequence[float], digits: int = 2) -> str:
    """Return ``median (low-high)``."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def peak_bytes(layer: torch.nn.Module, hidden: torch.Tensor) -> int:
    """Return by how much one forward and backward of a layer raises allocated memory at its peak, gradients included.

    On CUDA the caching allocator's own peak; on a CPU the highest running sum of what torch's allocator reports to the
    profiler, where resident memory would depend on what the process did before.
    """
    if platform.is_cuda():
        forward_backward(layer, hidden)
        clear_gradients(layer, hidden)
        platform.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(layer, hidden)
        platform.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _allocations(lambda: forward_backward(layer, hidden))  # the profiler knows the size of what it saw allocated only
    clear_gradients(layer, hidden)
    return max(itertools.accumulate(_allocations(lambda: forward_backward(layer, hidden)), initial=0))


def _allocations(work: Callable[[], object]) -> list[int]:
    """Return the bytes of every allocation (and, negative, release) on the CPU while ``work`` runs, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [int(event["args"]["Bytes"]) for event in sorted(memory, key=lambda event: float(event["ts"]))]


def machine_line() -> str:
    """Say on what, with which versions and by which command the numbers were taken."""
    packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    today = datetime.now(UTC).date().isoformat()
    return f"{_machine()}; Python {host.python_version()}, {packages}; {today}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if platform.is_cuda() else "no GPU"
    threads = torch.get_num_threads()
    return f"{cores} cores of {_processor()}, {memory_gib:.0f} GiB, {gpu}, {threads} threads a rank"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return host.processor() or host.machine()


def command_line() -> str:
    """Return the command that prints this table again."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = f"torchrun --nproc-per-node {world_size}" if world_size > 1 else "python"
    program = Path(sys.argv[0])
    return " ".join([launcher, f"{program.parent.name}/{program.name}", *sys.argv[1:]])


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; floats are the caller's to format."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(options: argparse.Namespace, tables: Sequence[str], records: dict[str, Any]) -> None:
    """Print where the numbers come from and the tables; write the JSON if asked."""
    say(f"`{command_line()}`\n\n{machine_line()}\n")
    say("\n\n".join(tables))
    if options.json:
        write_json(options.json, options, records)


def write_json(path: Path, options: argparse.Namespace, records: dict[str, Any]) -> None:
    """Write numbers, options, machine and command."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content = {"command": command_line(), "machine": machine_line(), "options": settings, **records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
