"""One CUDA GPU: is the layer right, how fast is it, how much memory does it take. Run it by benchmarks/gpu.sh.

First the layer's output and gradients, in fp32 and bf16, are compared with a dense loop over the experts in float64 on
the CPU; if they differ by more than the tolerances below, nothing is timed. Then layer times in pairs against
Megatron's own layer with the fastest experts that it has there, and peak memory by load.

``--device cpu --tiny`` walks the same paths without a GPU, to test this program; its times mean nothing.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
import torch.nn.functional as F
from common import (
    adamoe_moe,
    baseline_moe,
    build_layer,
    build_megatron_layer,
    clear_gradients,
    command_line,
    forward_backward,
    hidden_states,
    in_pairs,
    machine_line,
    markdown,
    peak_bytes,
    ranks,
    write_json,
)

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, run_tool, say
from adamoe_dist.errors import UserError
from adamoe_dist.experts import choose_kernel

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}
"""Per dtype: of the output and the gradients of input and experts; of the router's gradient, where weights nearly
cancel. Norm of the difference over the norm of the reference."""
MARGIN = 1e-4
"""A token may be routed differently only where float64 scores of the two choices are this close."""


@dataclass
class Check:
    """One comparison with the float64 loop."""

    dtype: str
    kernel: str
    experts: int
    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def reference(layer: Any, hidden: torch.Tensor, routing_map: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """Return output and gradients of a dense loop over experts in float64 on the CPU.

    Args:
        layer: the layer whose weights are used.
        hidden: (T, 1, H), as the layer saw it.
        routing_map: (T, E), the layer's own selection, which is checked against float64 scores.
        top_k: k.
    """
    names = ("router.weight", "router.null_weight", "experts.weight1", "experts.weight2")
    weights = dict(layer.named_parameters())
    leaves = {n: weights[n].detach().double().cpu().requires_grad_() for n in names if n in weights}
    tokens_TH = hidden.detach().double().cpu().flatten(0, 1).requires_grad_()
    rows_AH = [leaves[name] for name in names[:2] if name in leaves]
    scores_TA = tokens_TH @ torch.cat(rows_AH).t()
    map_TE = routing_map.cpu()
    _check_selection(scores_TA.detach(), map_TE, top_k)
    scores_TE = scores_TA[:, : map_TE.shape[1]].masked_fill(~map_TE, -torch.inf)
    has_experts_T1 = map_TE.any(dim=1, keepdim=True)
    probs_TE = scores_TE.masked_fill(~has_experts_T1, 0.0).softmax(dim=1) * map_TE
    output_TH = torch.zeros_like(tokens_TH)
    for expert in range(map_TE.shape[1]):
        gate, up = (tokens_TH @ leaves["experts.weight1"][expert].t()).chunk(2, dim=-1)
        product = (F.silu(gate) * up) @ leaves["experts.weight2"][expert].t()
        output_TH = output_TH + probs_TE[:, expert : expert + 1] * product
    output_TH.backward(cotangent(output_TH.shape))
    gradients = {"input": tokens_TH.grad, **{name: leaf.grad for name, leaf in leaves.items()}}
    return {"output": output_TH.detach()} | {
        name: torch.zeros(()) if gradient is None else gradient for name, gradient in gradients.items()
    }


def _check_selection(scores_TA: torch.Tensor, map_TE: torch.Tensor, top_k: int) -> None:
    """Accept another selection than float64's only where it is a matter of rounding."""
    true = map_TE.shape[1]
    chosen_TA = torch.zeros_like(scores_TA, dtype=torch.bool).scatter(1, scores_TA.topk(top_k).indices, True)
    different_T = (chosen_TA[:, :true] != map_TE).any(dim=1)
    ordered_TA = scores_TA.sort(dim=1, descending=True).values
    if top_k < scores_TA.shape[1]:
        different_T &= ordered_TA[:, top_k - 1] - ordered_TA[:, top_k] > MARGIN
    if bool(different_T.any()):
        raise UserError(f"{int(different_T.sum())} tokens are routed to other experts than float64 scores choose")


def cotangent(shape: torch.Size) -> torch.Tensor:
    """Return the fixed float64 cotangent of both sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def check(dtype: torch.dtype, kernel: str, moe: dict[str, Any], options: Any) -> list[Check]:
    """Compare one layer with the reference, quantity by quantity."""
    layer = build_layer({**moe, "router": {"balance": {"type": "none"}}}, options.check_hidden, dtype, kernel)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(5.0)  # of a size at which experts and routes differ clearly
    hidden = hidden_states(options.check_tokens, options.check_hidden, dtype)
    maps: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda _, __, outputs: maps.append(outputs[1]))
    clear_gradients(layer, hidden)
    output = layer(hidden)[0]
    hook.remove()
    output.backward(cotangent(output.flatten(0, 1).shape).view(output.shape).to(output))
    ours = {name: parameter.grad for name, parameter in layer.named_parameters()}
    ours |= {"output": output.detach().flatten(0, 1), "input": hidden.grad.flatten(0, 1)}  # type: ignore[union-attr]
    results = []
    for name, expected in reference(layer, hidden, maps[0], moe["top_k"]).items():
        found = ours[name]
        difference = (found.double().cpu() - expected).norm() if found is not None else expected.norm()
        scale = expected.norm()
        error = float(difference / scale) if scale > 0 else float(difference)
        tolerance = TOLERANCES[dtype][name == "router.weight"]
        results.append(Check(_name(dtype), kernel, moe["num_experts"], name, error, tolerance))
    return results


def check_all(options: Any) -> list[Check]:
    """Check every dtype with the kernel that a run there would use, and bf16 with every kernel."""
    checks = []
    for dtype in (torch.float32, torch.bfloat16):
        widths = (options.check_hidden, options.check_hidden)
        chosen = choose_kernel("auto", dtype, platform.is_cuda(), widths)[0]
        kernels = dict.fromkeys([chosen, "grouped_mm"] if dtype == torch.bfloat16 else [chosen])
        for kernel in kernels:
            for n in options.experts:
                moe = {**adamoe_moe(n, n, 3), "expert_hidden_size": options.check_hidden}
                checks += check(dtype, kernel, moe, options)
    return checks


def variants(n: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, baseline's name, ``moe`` section) of what is timed at n true experts."""
    found = [
        ("m=0 k=2", "top-2", adamoe_moe(n, 0, 2)),
        (f"m={n} k=3", "top-2", adamoe_moe(n, n, 3)),
        (f"m={3 * n} k=4", "top-2", adamoe_moe(n, 3 * n, 4)),
    ]
    return found + ([("m=64 k=8", "top-8", adamoe_moe(n, n, 8))] if n == 64 else [])


def time_all(options: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Time every variant beside Megatron's layer; count the experts' rows and the peak memory of both."""
    records = []
    for n in options.experts:
        inner = {"expert_hidden_size": options.expert_hidden}
        for name, baseline, moe in variants(n):
            layer = build_layer({**moe, **inner}, options.hidden, torch.bfloat16)
            top_k = int(baseline.removeprefix("top-"))
            theirs, experts = build_megatron_layer(
                {**baseline_moe(n, top_k), **inner}, options.hidden, torch.bfloat16, settings
            )
            hidden = hidden_states(options.tokens, options.hidden, torch.bfloat16)
            rows: list[int] = []
            hook = layer.experts.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].shape[0]))
            forward_backward(layer, hidden)
            hook.remove()
            pairs = in_pairs(
                partial(forward_backward, layer, hidden),
                partial(forward_backward, theirs, hidden),
                options.pairs,
                warm_up=3,
                iterations=options.iterations,
            )
            records.append(
                {
                    "num_experts": n,
                    "variant": name,
                    "baseline": f"Megatron {baseline}, {experts}",
                    "rows": rows[0],
                    "load": rows[0] / options.tokens,
                    "tokens_per_second": options.tokens / statistics.median(pairs.measured),
                    "baseline_tokens_per_second": options.tokens / statistics.median(pairs.baseline),
                    "peak_bytes": peak_bytes(layer, hidden),
                    "baseline_peak_bytes": peak_bytes(theirs, hidden),
                    **pairs.record(),
                }
            )
    return records


def checks_table(checks: list[Check]) -> str:
    """Return the largest error of each quantity."""
    rows = [
        (c.dtype, c.kernel, c.experts, c.quantity, f"{c.error:.1e}", f"{c.tolerance:.0e}", "yes" if c.passed else "NO")
        for c in checks
    ]
    return markdown(("dtype", "kernel", "n", "against float64", "relative error", "tolerance", "within"), rows)


def times_table(records: list[dict[str, Any]]) -> str:
    """Return times and tokens a second."""
    rows = [
        (
            record["num_experts"],
            record["variant"],
            record["baseline"],
            f"{record['seconds'] * 1e3:.2f}",
            f"{record['baseline_seconds'] * 1e3:.2f}",
            f"{record['ratio_median']:.2f} ({record['ratio_low']:.2f}-{record['ratio_high']:.2f})",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['baseline_tokens_per_second']:,.0f}",
        )
        for record in records
    ]
    header = ("n", "layer", "baseline", "ms", "its ms", "ratio (range)", "tokens/s", "its tokens/s")
    return markdown(header, rows)


def memory_table(records: list[dict[str, Any]]) -> str:
    """Return the experts' rows and the peak memory by load."""
    rows = [
        (
            record["num_experts"],
            record["variant"],
            f"{record['load']:.2f}",
            record["rows"],
            f"{record['peak_bytes'] / 2**20:.1f}",
            f"{record['baseline_peak_bytes'] / 2**20:.1f}",
            f"{record['peak_bytes'] / record['baseline_peak_bytes']:.2f}",
        )
        for record in records
    ]
    return markdown(("n", "layer", "load", "rows", "peak MiB", "baseline's peak MiB", "ratio"), rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str]) -> int:
    """Check, measure, print, and write the JSON; exit code 1 where the layer is wrong."""
    parser = ToolParser("Correctness, time and memory of one MoE layer on one CUDA GPU.")
    parser.add_argument("output", type=Path, help="directory for gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test this program")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU walks through in seconds")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a pass")
    parser.add_argument("--hidden", type=int, default=2048, help="H")
    parser.add_argument("--expert-hidden", type=int, default=1024, help="inner width of an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="n: true experts")
    parser.add_argument("--pairs", type=int, default=11, help="timed pairs")
    parser.add_argument("--iterations", type=int, default=5, help="passes of one timing")
    parser.add_argument("--check-tokens", type=int, default=512, help="tokens of the correctness check")
    parser.add_argument("--check-hidden", type=int, default=256, help="its widths")
    parser.add_argument("--megatron", nargs="*", default=[], metavar="FIELD", help="switches of Megatron's to turn on")
    options = parser.parse_args(argv)
    if (options.device == "cuda") != platform.is_cuda():
        found = "has CUDA" if platform.is_cuda() else "has no CUDA that torch can use"
        raise UserError(f"--device {options.device} does not fit: this machine {found}")
    if options.tiny:
        options.tokens, options.hidden, options.expert_hidden, options.experts = 64, 64, 32, [8]
        options.check_tokens, options.check_hidden, options.pairs, options.iterations = 64, 64, 2, 1
    with ranks():
        checks = check_all(options)
        say(f"`{command_line()}`\n\n{machine_line()}\n\n{checks_table(checks)}\n")
        records: dict[str, Any] = {"checks": [asdict(c) for c in checks], "layers": []}
        passed = all(c.passed for c in checks)
        if passed:
            records["layers"] = time_all(options, dict.fromkeys(options.megatron, True))
            say(f"{times_table(records['layers'])}\n\n{memory_table(records['layers'])}")
        write_json(options.output / "gpu.json", options, records)
    if not passed:
        sys.stderr.write("error: the layer differs from float64 by more than the tolerances; nothing was timed\n")
    return 0 if passed else 1


if __name__ == "__main__":
    run_tool(main)
