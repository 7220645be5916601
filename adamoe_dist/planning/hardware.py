"""What a run is planned for: devices, machines, links, and what is assumed about how well they are used."""

import dataclasses
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamoe_dist.config import read_values
from adamoe_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device from its vendor's data sheet: dense products, no sparsity; rates are a direction's.

    ``inter_node_gb_s`` is one network port for each device, as such machines are sold.
    """

    name: str
    peak_tflops_16: float
    peak_tflops_32: float
    memory_gib: float
    memory_gb_s: float
    intra_node_gb_s: float
    inter_node_gb_s: float

    @property
    def is_cpu(self) -> bool:
        """Whether ranks are processes on CPU cores."""
        return self.name == "cpu"

    def peak_flops(self, precision: str) -> float:
        """Operations a second of matrix products in a precision; fp32 means fp32, not TF32."""
        return 1e12 * (self.peak_tflops_32 if precision == "fp32" else self.peak_tflops_16)


def _device(name: str, *numbers: float) -> Device:
    names = [entry.name for entry in dataclasses.fields(Device)]
    return Device(**dict(zip(names, (name, *numbers), strict=True)))  # type: ignore[arg-type]


DEVICES = {
    device.name: device
    for device in (
        _device("a100", 312, 19.5, 79, 2039, 300, 25),
        _device("h100", 989, 67, 78, 3350, 450, 50),
        _device("h200", 989, 67, 139, 4800, 450, 50),
        _device("b200", 2250, 75, 178, 8000, 900, 50),
        _device("l40s", 362, 91.6, 44, 864, 32, 12.5),
        _device("cpu", 0.05, 0.05, 12, 20, 2, 1.25),
    )
}
"""Memory in GiB is what a process can have of it; ``cpu`` is one core of a server."""

SLOWER_FORMS = {"h100": {"pcie", "nvl"}, "h200": {"nvl"}}
"""Words in the driver's name of cards that have less than the numbers above."""


def find_device(gpu_name: str) -> Device | None:
    """Return the entry of a GPU by its driver's name, such as ``NVIDIA H100 80GB HBM3``; None for any other.

    A part of a GPU (MIG) and the slower cards of the same name have none.
    """
    words = set(re.split(r"[\s-]+", gpu_name.lower()))
    for device in DEVICES.values():
        if device.name in words and not words & {"mig", *SLOWER_FORMS.get(device.name, ())}:
            return None if device.is_cpu else device
    return None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that are all alike, their devices, and the ranks on them: one a device, numbered machine by machine."""

    nodes: int
    gpus_per_node: int
    device: Device

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


_ABOVE_0 = math.ulp(0.0)


def _assumed(
    default: float, doc: str, cpu: float | None = None, least: float = 0.0, most: float = sys.float_info.max
) -> Any:
    metadata = {"doc": doc, "cpu": default if cpu is None else cpu, "least": least, "most": most}
    return field(default=default, metadata=metadata)


def _share(default: float, doc: str, cpu: float | None = None, least: float = _ABOVE_0) -> Any:
    return _assumed(default, doc, cpu, least, 1.0)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """All that a prediction takes for granted.

    The defaults for GPUs are guesses that no measurement here supports; those for CPU ranks are from runs on CPU ranks
    (docs/planning.md).
    """

    matmul_efficiency: float = _share(0.55, "part of peak that dense matrix products reach", cpu=0.6)
    attention_efficiency: float = _share(0.40, "part of peak that the attention core reaches", cpu=0.3)
    expert_efficiency: float = _share(0.40, "part of peak that the experts' grouped products reach", cpu=0.5)
    expert_imbalance: float = _assumed(1.1, "rows of the fullest rank over the mean", cpu=1.03, least=1.0)
    memory_efficiency: float = _share(0.7, "part of the memory's rate that element-wise work reaches")
    activation_moves: float = _assumed(
        6.0, "times that a kept activation goes through memory, forward and backward, outside of products"
    )
    layer_overhead_us: float = _assumed(
        500.0, "launches and host work of a layer's forward pass, microseconds", cpu=2e3
    )
    intra_efficiency: float = _share(0.75, "part of the rate within a node that collectives reach")
    inter_efficiency: float = _share(0.8, "part of the rate between nodes that collectives reach", cpu=0.57)
    latency_us: float = _assumed(20.0, "start of one collective, microseconds", cpu=300.0)
    overlap: float = _share(
        0.5, "part of the computing time behind which ZeRO's exchanges can hide, where they are overlapped", least=0.0
    )
    host_gb_s: float = _assumed(25.0, "rate to CPU memory for an offloaded optimizer, a rank, GB/s", least=_ABOVE_0)
    host_update_gb_s: float = _assumed(
        15.0, "rate at which the CPU updates an offloaded state, a rank, GB/s", cpu=5.0, least=_ABOVE_0
    )
    memory_overhead_gib: float = _assumed(
        2.0, "memory of the driver (on a CPU: of the empty process), the collectives' library, fragments, GiB", cpu=0.38
    )
    memory_share: float = _share(0.95, "part of the device's memory that may be filled")

    @classmethod
    def of(cls, device: Device) -> "Assumptions":
        """Return the defaults for a device."""
        return cls(**{entry.name: entry.metadata["cpu"] for entry in dataclasses.fields(cls)} if device.is_cpu else {})

    def changed(self, values: dict[str, Any], origin: str = "--assume") -> "Assumptions":
        """Return these with other values.

        Raises:
            UserError: there is no such assumption, or the value is no number or out of its range.
        """
        known = {entry.name: entry.metadata for entry in dataclasses.fields(self)}
        changes = {}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{origin} {name}={value}: no such assumption; known: {', '.join(sorted(known))}")
            least, most = known[name]["least"], known[name]["most"]
            changes[name] = _number(value)
            if not least <= changes[name] <= most:
                words = "above 0" if least == _ABOVE_0 else f"at least {least:g}"
                raise UserError(f"{origin} {name}={value}: must be a number, {words} and at most {most:g}")
        return dataclasses.replace(self, **changes)

    def lines(self) -> list[str]:
        """Return each with its value and meaning."""
        return [f"{e.name}={getattr(self, e.name):g}  {e.metadata['doc']}" for e in dataclasses.fields(self)]


def read_assumptions(assumptions: Assumptions, file: Path | None, pairs: Iterable[str]) -> Assumptions:
    """Apply a YAML file of ``name: value``, and then pairs ``name=value``.

    Raises:
        UserError: the file cannot be read, or something in it or in the pairs is no assumption.
    """
    if file is not None:
        assumptions = assumptions.changed(read_values(file, option="--assumptions"), f"--assumptions {file}:")
    values = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UserError(f"--assume {pair!r} is not name=value")
        values[name.strip()] = text
    return assumptions.changed(values)


def _number(value: Any) -> float:
    """Return a number, also one that YAML takes for text (1e3); NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
