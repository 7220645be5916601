"""A plan: one configuration on one cluster, with all that follows."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from adamoe_dist.config import Config, Resolved, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning.activations import tokens_of_a_rank
from adamoe_dist.planning.compute import flops_per_token, hardware_flops_per_token
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.memory import PeakMemory, peak_memory
from adamoe_dist.planning.parameters import Parameters, count_parameters, expected_load
from adamoe_dist.planning.placement import Groups, place
from adamoe_dist.planning.rows import DispatchRows, dispatch_rows
from adamoe_dist.planning.spread import load_distribution
from adamoe_dist.planning.step import Setting, StepTime, step_time


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many true experts a token uses: the mean, and the part of the tokens that use none where it is known."""

    true_experts_per_token: float
    all_null_share: float | None = None

    @classmethod
    def expected(cls, config: Config) -> "Load":
        """Return what a configuration is laid out for."""
        return cls(true_experts_per_token=expected_load(config))

    def distribution(self, config: Config) -> tuple[float, ...]:
        """Return P(x) of x true experts."""
        moe = config.moe
        return load_distribution(
            moe.num_experts, moe.num_null_experts, moe.top_k, self.true_experts_per_token, self.all_null_share
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run holds, sends, computes and takes."""

    config: Config
    cluster: Cluster
    assumptions: Assumptions
    resolved: Resolved
    precision: str
    padded_vocab_size: int
    load: Load
    parameters: Parameters
    groups: Groups
    rows: DispatchRows
    """Of one rank, one layer, one micro-batch."""
    memory: PeakMemory
    time: StepTime
    model_flops: float
    """Of a token, forward and backward."""
    hardware_flops: float

    @property
    def rows_factor(self) -> float:
        """Layers, micro-batches and ranks of a step that each send :attr:`rows`."""
        layout = self.resolved.layout
        return self.parameters.moe_layers * self.resolved.micro_batches_per_rank * layout.stage_ranks

    @property
    def memory_gib(self) -> float:
        """The peak of a rank, what the driver takes included."""
        return self.memory.total / 2**30 + self.assumptions.memory_overhead_gib

    @property
    def memory_limit_gib(self) -> float:
        """What a rank may have."""
        return self.cluster.device.memory_gib * self.assumptions.memory_share

    @property
    def fits(self) -> bool:
        """Whether it has that much."""
        return self.memory_gib <= self.memory_limit_gib

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.resolved.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices could do in that time."""
        return self._utilization(self.model_flops)

    @property
    def hfu(self) -> float:
        """What is computed, recomputation included, over what the devices could do in that time."""
        return self._utilization(self.hardware_flops)

    def _utilization(self, flops: float) -> float:
        peak = self.cluster.device.peak_flops(self.precision) * self.cluster.world_size
        return flops * self.tokens_per_second / peak


def planned_precision(config: Config, cluster: Cluster) -> str:
    """Return the precision that ``train.precision`` means on a cluster."""
    if config.train.precision != "auto":
        return config.train.precision
    return "fp32" if cluster.device.is_cpu else "bf16"


def make_plan(
    config: Config, cluster: Cluster, assumptions: Assumptions, vocab_size: int, load: Load | None = None
) -> Plan:
    """Plan a run.

    Args:
        config: the tree.
        cluster: what it runs on.
        assumptions: what is taken for granted.
        vocab_size: ids of the tokenizer.
        load: of a token; None: as the configuration is laid out for.

    Raises:
        UserError: the configuration is refused on that many ranks, or no token can have such a load.
    """
    resolved = resolve(config, cluster.world_size)
    load, precision = load or Load.expected(config), planned_precision(config, cluster)
    if cluster.device.is_cpu and precision == "fp16":
        raise UserError("train.precision=fp16 needs CUDA and --gpu cpu has none; use bf16 or fp32")
    padded, groups = config.padded_vocab_size(vocab_size), place(resolved.layout, cluster.gpus_per_node)
    parameters = count_parameters(config, padded)
    tokens, mean = tokens_of_a_rank(config, resolved), load.true_experts_per_token
    rows = dispatch_rows(config, resolved.layout, groups, tokens, load.distribution(config), precision)
    kept_rows = (rows.rows + rows.same_rank) * rows.row_bytes
    memory = peak_memory(config, resolved, parameters, padded, precision, mean, kept_rows, cluster.device.is_cpu)
    setting = Setting(
        config=config,
        resolved=resolved,
        parameters=parameters,
        padded_vocab_size=padded,
        precision=precision,
        load=mean,
        cluster=cluster,
        assumptions=assumptions,
        groups=groups,
        rows=rows,
    )
    return Plan(
        config=config,
        cluster=cluster,
        assumptions=assumptions,
        resolved=resolved,
        precision=precision,
        padded_vocab_size=padded,
        load=load,
        parameters=parameters,
        groups=groups,
        rows=rows,
        memory=memory,
        time=step_time(setting, memory.state),
        model_flops=flops_per_token(config, parameters, mean),
        hardware_flops=hardware_flops_per_token(config, parameters, mean),
    )


def memory_by_stage(plan: Plan) -> dict[int, PeakMemory | UserError]:
    """Return the peak of a rank in each ZeRO stage with all else as planned, or why the stage is refused."""
    found: dict[int, PeakMemory | UserError] = {}
    kept_rows = (plan.rows.rows + plan.rows.same_rank) * plan.rows.row_bytes
    for stage in range(4):
        zero: Any = {"stage": stage}
        config = dataclasses.replace(plan.config, zero=dataclasses.replace(plan.config.zero, **zero))
        try:
            found[stage] = peak_memory(
                config,
                resolve(config, plan.cluster.world_size),
                plan.parameters,
                plan.padded_vocab_size,
                plan.precision,
                plan.load.true_experts_per_token,
                kept_rows,
                plan.cluster.device.is_cpu,
            )
        except UserError as refusal:
            found[stage] = refusal
    return found


def calibrated(plan: Plan, measured_step_s: float) -> Assumptions:
    """Return the assumptions with which a plan takes as long as a step did: its computing as much slower or faster.

    What a step's exchanges take stays; all parts of computing change by one factor.

    Raises:
        UserError: the exchanges alone would take longer.
    """
    time, assumptions = plan.time, plan.assumptions
    computing = time.dense + time.experts + time.update
    factor = (measured_step_s - (time.total - computing)) / computing
    if factor <= 0:
        raise UserError(
            f"a step of {measured_step_s:g} s is shorter than its exchanges are taken to be, "
            f"{time.total - computing:.3g} s; correct the rates of the links"
        )
    names = ("matmul_efficiency", "attention_efficiency", "expert_efficiency", "memory_efficiency")
    changes = {name: getattr(assumptions, name) / factor for name in names}
    return dataclasses.replace(assumptions, layer_overhead_us=assumptions.layer_overhead_us * factor, **changes)
