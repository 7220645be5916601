"""Running sums of one MoE layer's routing and dispatch, kept on the device until a step is logged."""

import torch
from torch import Tensor

from adamoe_dist.routing.statistics import RoutingStatistics
from adamoe_dist.routing.target_load import MARGIN_BINS

SUMS = (
    "micro_batches",
    "balance_loss",
    "z_loss",
    "dispatch_rows_same_rank",
    "dispatch_rows_same_node",
    "dispatch_rows_other_node",
    "dispatch_rows_undeduplicated",
    "dispatch_bytes_same_node",
    "dispatch_bytes_other_node",
    "score_entropy",
    "dropped_pairs",
    "nonfinite_tokens",
)


class RoutingCounters:
    """Sums over the micro-batches of one step, on one rank, of one layer."""

    loss_weight: Tensor | None = None
    """What the losses of the micro-batch in hand weigh in their mean over micro-batches; None: 1."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        """Count for a layer of ``num_experts`` true experts whose tokens fill ``top_k`` slots."""
        self.num_experts = num_experts
        self.top_k = top_k
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self._sums: dict[str, Tensor | float] = dict.fromkeys(SUMS, 0.0)
        self._routing: Tensor | None = None
        self._loads: Tensor | None = None
        self._margins: Tensor | None = None

    def add_statistics(self, statistics: RoutingStatistics) -> None:
        """Add one micro-batch's selection."""
        packed = statistics.packed()
        self._routing = packed if self._routing is None else self._routing + packed
        self._add("micro_batches", 1)

    def add_margins(self, counts_M: Tensor) -> None:
        """Add one micro-batch's counts of margins, by which the target load's controller sets its gain."""
        self._margins = counts_M if self._margins is None else self._margins + counts_M

    def add_balance_loss(self, loss: Tensor) -> None:
        """Add one micro-batch's balance loss, coefficient included."""
        self._add("balance_loss", self._weighted(loss))

    def add_z_loss(self, loss: Tensor) -> None:
        """Add one micro-batch's z-loss, coefficient included."""
        self._add("z_loss", self._weighted(loss))

    def add_dispatch(
        self,
        *,
        rows_same_rank: Tensor | int,
        rows_same_node: Tensor | int,
        rows_other_node: Tensor | int,
        rows_undeduplicated: Tensor | int,
        bytes_same_node: Tensor | int,
        bytes_other_node: Tensor | int,
    ) -> None:
        """Add what one forward dispatch sent: rows and bytes by distance; un-deduplicated rows to other ranks."""
        self._add("dispatch_rows_same_rank", rows_same_rank)
        self._add("dispatch_rows_same_node", rows_same_node)
        self._add("dispatch_rows_other_node", rows_other_node)
        self._add("dispatch_rows_undeduplicated", rows_undeduplicated)
        self._add("dispatch_bytes_same_node", bytes_same_node)
        self._add("dispatch_bytes_other_node", bytes_other_node)

    def add_dropped(self, pairs: Tensor) -> None:
        """Add the (token, true expert) pairs that exceeded an expert's capacity."""
        self._add("dropped_pairs", pairs)

    def add_score_entropy(self, entropy: Tensor) -> None:
        """Add the entropies of the router's scores, summed over one micro-batch's real tokens."""
        self._add("score_entropy", entropy)

    def add_nonfinite(self, tokens: Tensor) -> None:
        """Add the real tokens whose scores hold NaN or infinity."""
        self._add("nonfinite_tokens", tokens)

    def add_loads(self, loads: Tensor) -> Tensor:
        """Add the loads of one micro-batch and return those of the step so far."""
        self._loads = loads if self._loads is None else self._loads + loads
        return self._loads

    def value(self, name: str, device: torch.device) -> Tensor:
        """Return one of the sums as a 0-d fp64 tensor, without waiting for the device."""
        return torch.as_tensor(self._sums[name], dtype=torch.float64, device=device)

    def vector(self, device: torch.device) -> Tensor:
        """Return the sums as one fp64 vector that can be added over layers and ranks: see :func:`read_vector`."""
        sums = torch.stack([self.value(name, device) for name in SUMS])
        return torch.cat([sums, self.packed_routing(device).to(torch.float64)])

    def packed_routing(self, device: torch.device) -> Tensor:
        """Return the selections so far as :meth:`RoutingStatistics.packed` lays them out, int64."""
        if self._routing is None:
            return torch.zeros(self.top_k + 1 + self.num_experts, dtype=torch.int64, device=device)
        return self._routing

    def packed_control(self, device: torch.device) -> Tensor:
        """Return what the target load's controller needs: the counts of margins, then :meth:`packed_routing`."""
        counts_M = self._margins
        if counts_M is None:
            counts_M = torch.zeros(MARGIN_BINS, dtype=torch.int64, device=device)
        return torch.cat([counts_M, self.packed_routing(device)])

    def _weighted(self, loss: Tensor) -> Tensor:
        return loss.detach() if self.loss_weight is None else loss.detach() * self.loss_weight

    def _add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums[name] + value


def read_vector(vector: Tensor, num_experts: int) -> tuple[dict[str, float], RoutingStatistics]:
    """Split what :meth:`RoutingCounters.vector` returned, perhaps summed, into named sums and statistics.

    ``dispatch_rows`` and ``dispatch_bytes`` are made here: what goes to other ranks, near and far.
    """
    sums = dict(zip(SUMS, vector[: len(SUMS)].tolist(), strict=True))
    for what in ("dispatch_rows", "dispatch_bytes"):
        sums[what] = sums[f"{what}_same_node"] + sums[f"{what}_other_node"]
    return sums, RoutingStatistics.unpacked(vector[len(SUMS) :].round().long(), num_experts)
