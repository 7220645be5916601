"""The AdaMoE router in Megatron-core's router slot.

Legend: T tokens, H hidden size, E true experts (n), N null experts (m), A = E + N, K selected slots.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from adamoe_dist.config import MoEConfig
from adamoe_dist.routing.counters import RoutingCounters
from adamoe_dist.routing.initialisation import expand_shared, initial_null_rows
from adamoe_dist.routing.losses import balance_loss, z_loss
from adamoe_dist.routing.selection import Selection, biased_scores, select
from adamoe_dist.routing.statistics import routing_statistics
from adamoe_dist.routing.target_load import margin_counts, margins


class AdaMoERouter(Router):
    """Scores n true and m null experts, picks k, and hands Megatron the true ones only.

    ``weight`` (E, H) is Megatron's own router matrix, so that a vanilla checkpoint loads; ``null_weight`` (N, H), or
    (1, H) where all null experts share a row, exists only where m > 0. Scores, weights and losses are computed in fp32.

    The balance loss (AdaMoE equation 6, or equation 3 with ``switch``) is attached to each layer's combine weights; it
    is ``k x balance_coefficient`` at perfect balance, where Megatron's own convention is the coefficient itself. With
    weights normalised over the true experts the language-model loss gives null scores no gradient at all: the null
    share is steered by the balance loss, and where ``moe.router.target_load`` is set by ``expert_bias`` (E,): fp32,
    added to the true experts' scores for selection only, in training and evaluation.
    """

    balance_coefficient: float
    expert_bias: Tensor | None

    def __init__(
        self, config: object, moe: MoEConfig, pg_collection: ProcessGroupCollection, counters: RoutingCounters
    ) -> None:
        """Allocate the router of one layer.

        Args:
            config: Megatron's configuration.
            moe: the ``moe`` section.
            pg_collection: Megatron's process groups.
            counters: where this layer's routing is counted.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.moe = moe
        self.counters = counters
        self.balance_coefficient = moe.router.balance.coefficient
        if moe.num_null_experts > 0:
            rows_NH = initial_null_rows(
                moe.router.null_init, self.weight.detach(), moe.num_null_experts, self.config.init_method
            )
            self.null_weight = torch.nn.Parameter(rows_NH.to(self.weight.dtype))
            self.null_weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        else:
            self.register_parameter("null_weight", None)
        has_bias = moe.router.target_load is not None
        bias_E = torch.zeros(moe.num_experts, dtype=torch.float32, device=self.weight.device) if has_bias else None
        self.register_buffer("expert_bias", bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaMoERouter":
        """Move the bias with the module, but keep it fp32: a cast would lose the small steps that it is made of."""
        bias_E = self.expert_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.expert_bias is not None:
            self.expert_bias = bias_E.to(self.expert_bias.device)
        return self

    def gating(self, input: Tensor) -> Tensor:
        """Return fp32 scores (T, A) of token vectors (..., H): the true experts' columns first."""
        tokens_TH = input.reshape(-1, input.shape[-1]).to(torch.float32)
        true_TE = F.linear(tokens_TH, self.weight.to(torch.float32))
        if self.null_weight is None:
            return true_TE
        null_TN = F.linear(tokens_TH, self.null_weight.to(torch.float32))
        if null_TN.shape[1] != self.moe.num_null_experts:
            null_TN = expand_shared(null_TN, self.moe.num_null_experts)
        return torch.cat([true_TE, null_TN], dim=1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return combine weights and map over the true experts, each (T, E), with the losses attached."""
        mask_T = padding_mask.reshape(-1) if padding_mask is not None else None
        selection = select(
            logits, self.moe.num_experts, self.moe.top_k, self.moe.router.normalize, mask_T, bias_E=self.expert_bias
        )
        probs_TE = selection.probs_TE
        if self.training and torch.is_grad_enabled():
            probs_TE = self._attach_losses(probs_TE, logits, selection, mask_T)
            self.counters.add_statistics(routing_statistics(selection, mask_T))
            if self.expert_bias is not None:
                self._count_margins(logits, selection, self.expert_bias)
        return probs_TE, selection.routing_map_TE

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route token vectors (..., H).

        Args:
            input: hidden states.
            padding_mask: bool in the order of the tokens, true at padding, which is routed nowhere.

        Returns:
            ``(probs (T, E), routing_map (T, E))``: what Megatron's MoE layer expects, null experts left out.
        """
        return self.routing(self.gating(input), padding_mask)

    @torch.no_grad()
    def _count_margins(self, logits_TA: Tensor, selection: Selection, bias_E: Tensor) -> None:
        scores_TA = biased_scores(logits_TA, bias_E)
        self.counters.add_margins(margin_counts(margins(scores_TA, selection.selected_TA, selection.num_true)))

    def _attach_losses(
        self, probs_TE: Tensor, logits_TA: Tensor, selection: Selection, mask_T: Tensor | None
    ) -> Tensor:
        kind = self.moe.router.balance.type
        if kind != "none" and self.balance_coefficient > 0:
            loss = balance_loss(logits_TA, selection, kind, mask_T)
            loss = loss * self.balance_coefficient
            self.counters.add_balance_loss(loss)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss)
        if self.moe.router.z_loss_coefficient > 0:
            loss = z_loss(logits_TA, mask_T) * self.moe.router.z_loss_coefficient
            self.counters.add_z_loss(loss)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss)
        return probs_TE
