"""The AdaMoE router in Megatron-core's router slot.

Legend: T tokens, H hidden size, E true experts (n), N null experts (m), A = E + N, K selected slots.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from adamoe_dist.config import MoEConfig
from adamoe_dist.routing.capacity import expert_capacity, within_capacity
from adamoe_dist.routing.counters import RoutingCounters
from adamoe_dist.routing.gating_residual import ScoreChain
from adamoe_dist.routing.initialisation import expand_shared, initial_null_rows
from adamoe_dist.routing.losses import BatchLoads, balance_loss, selected_counts, z_loss
from adamoe_dist.routing.selection import Selection, select
from adamoe_dist.routing.statistics import nonfinite_tokens, routing_statistics, score_entropy
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

    Losses are attached and everything is counted where gradients are recorded, hence once under activation recompute,
    whose first forward pass records none.
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
        self._chain: ScoreChain | None = None
        self._place = 0
        self._null_weights_TW: Tensor | None = None
        if moe.num_null_experts > 0:
            rows_NH = initial_null_rows(
                moe.router.null_init, self.weight.detach(), moe.num_null_experts, self.config.init_method
            )
            self.null_weight = torch.nn.Parameter(rows_NH.to(self.weight.dtype))
            self.null_weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        else:
            self.register_parameter("null_weight", None)
        self.register_parameter("gating_residual_weight", None)
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

    def join(self, chain: ScoreChain, place: int) -> None:
        """Take ``place`` (from 0) in a chain of routers; all but the first get ``gating_residual_weight`` (A, A).

        It starts at zero, so that the model starts as the one without.
        """
        self._chain, self._place = chain, place
        if place > 0:
            experts = self.moe.num_experts + self.moe.num_null_experts
            weight_AA = torch.nn.Parameter(torch.zeros(experts, experts, dtype=self.weight.dtype))
            weight_AA.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
            self.gating_residual_weight = weight_AA

    def gating(self, input: Tensor) -> Tensor:
        """Return fp32 scores (T, A) of token vectors (..., H): the true experts' columns first."""
        tokens_TH = input.reshape(-1, input.shape[-1]).to(torch.float32)
        if self.null_weight is None:
            return F.linear(tokens_TH, self.weight.to(torch.float32))
        rows = torch.cat([self.weight, self.null_weight]).to(torch.float32)
        scores_TR = F.linear(tokens_TH, rows)  # one product over all rows reads the tokens once
        if self.null_weight.shape[0] == self.moe.num_null_experts:
            return scores_TR
        true_TE, shared_T1 = scores_TR.split([self.moe.num_experts, 1], dim=1)
        return torch.cat([true_TE, expand_shared(shared_T1, self.moe.num_null_experts)], dim=1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return combine weights and map over the true experts, each (T, E), with the losses attached."""
        mask_T = padding_mask.reshape(-1) if padding_mask is not None else None
        router, types = self.moe.router, self.moe.null_types
        num_with_output = types.identity + types.constant
        selection = select(
            logits,
            self.moe.num_experts,
            self.moe.top_k,
            router.normalize,
            mask_T,
            score_function=router.score_function,
            bias_E=self.expert_bias,
            num_with_output=num_with_output,
        )
        self._null_weights_TW = selection.null_probs_TW if num_with_output else None
        probs_TE, map_TE = self._within_capacity(selection)
        if self.training and torch.is_grad_enabled():
            self._count(logits, selection, map_TE, mask_T)
            probs_TE = self._attach_losses(probs_TE, logits, selection, mask_T)
        return probs_TE, map_TE

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route token vectors (..., H).

        Args:
            input: hidden states.
            padding_mask: bool in the order of the tokens, true at padding, which is routed nowhere.

        Returns:
            ``(probs (T, E), routing_map (T, E))``: what Megatron's MoE layer expects, null experts left out.
        """
        return self.routing(self._with_residual(self.gating(input)), padding_mask)

    def take_null_weights(self) -> Tensor:
        """Return the weights (T, W) of identity and constant experts that the last routing gave, and forget them."""
        weights_TW, self._null_weights_TW = self._null_weights_TW, None
        assert weights_TW is not None, "the router has not run"
        return weights_TW

    def _with_residual(self, logits_TA: Tensor) -> Tensor:
        """Add the map of the previous router's scores, and leave these for the next."""
        if self._chain is None:
            return logits_TA
        assert torch.is_grad_enabled() or not self.training, (
            "moe.router.gating_residual: a layer trains without recording gradients, as a recomputed one does; its "
            "scores would reach the next layer without a gradient"
        )
        if self.gating_residual_weight is not None:
            previous_TA = self._chain.take(self._place, logits_TA.shape[0])
            logits_TA = logits_TA + F.linear(previous_TA, self.gating_residual_weight.to(torch.float32))
        self._chain.give(self._place, logits_TA)
        return logits_TA

    def _within_capacity(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return weights and map without the pairs beyond an expert's capacity; nothing is renormalised."""
        factor = self.moe.router.capacity_factor
        if factor is None:
            return selection.probs_TE, selection.routing_map_TE
        probs_TE, map_TE = selection.probs_TE, selection.routing_map_TE
        capacity = expert_capacity(map_TE.shape[0], factor, self.moe.expected_load, self.moe.num_experts)
        kept_TE = within_capacity(probs_TE, map_TE, capacity, self.moe.router.drop_policy)
        return probs_TE.masked_fill(~kept_TE, 0.0), kept_TE

    @torch.no_grad()
    def _count(self, logits_TA: Tensor, selection: Selection, kept_TE: Tensor, mask_T: Tensor | None) -> None:
        self.counters.add_statistics(routing_statistics(selection, mask_T))
        self.counters.add_nonfinite(nonfinite_tokens(logits_TA, mask_T))
        self.counters.add_score_entropy(score_entropy(logits_TA, mask_T))
        if self.moe.router.capacity_factor is not None:
            self.counters.add_dropped(selection.routing_map_TE.sum() - kept_TE.sum())
        if self.expert_bias is not None:
            margins_T = margins(selection.ranking_TA, selection.selected_TA, selection.num_true)
            self.counters.add_margins(margin_counts(margins_T))

    def _attach_losses(
        self, probs_TE: Tensor, logits_TA: Tensor, selection: Selection, mask_T: Tensor | None
    ) -> Tensor:
        router, balance = self.moe.router, self.moe.router.balance
        if balance.type != "none" and self.balance_coefficient > 0:
            loss = balance_loss(
                logits_TA,
                selection,
                balance.type,
                mask_T,
                score_function=router.score_function,
                target_null_share=balance.target_null_share,
                batch=self._batch_loads(selection, mask_T),
            )
            loss = loss * self.balance_coefficient
            self.counters.add_balance_loss(loss)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss)
        if router.z_loss_coefficient > 0:
            loss = z_loss(logits_TA, mask_T, self._z_tokens(logits_TA.shape[0], mask_T)) * router.z_loss_coefficient
            self.counters.add_z_loss(loss)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss)
        return probs_TE

    @torch.no_grad()
    def _batch_loads(self, selection: Selection, mask_T: Tensor | None) -> BatchLoads | None:
        """Count over the scope of the balance loss, or return None where that is this rank's micro-batch. Collective.

        ``micro_batch``: over the ranks that share its sequences. ``global_batch``: over all ranks and the step's
        micro-batches so far. Gradients are summed over tensor ranks and averaged over the others. A step that weighs
        its micro-batches by their real tokens wants means of probabilities over each micro-batch's own.
        """
        is_global = self.moe.router.balance.scope == "global_batch"
        group = self.tp_dp_cp_group if is_global else self.tp_cp_group
        if not is_global and group.size() == 1:
            return None
        counts_A, tokens = selected_counts(selection, mask_T)
        here = torch.cat((counts_A, tokens.view(1)))
        sharing, own_tokens = group, tokens.clone()
        dist.all_reduce(here, group=group)
        counted = self.counters.add_loads(here) if is_global else here
        if is_global and self.counters.loss_weight is not None:
            sharing = self.tp_cp_group
            dist.all_reduce(own_tokens, group=sharing)
        else:
            own_tokens = here[-1]
        return BatchLoads(counted[:-1], counted[-1], own_tokens, sharing.size() // self.tp_group.size())

    @torch.no_grad()
    def _z_tokens(self, tokens: int, mask_T: Tensor | None) -> Tensor | int | None:
        """Real tokens of the micro-batch over the ranks that average its losses, or None: this rank's. Collective."""
        if self.tp_cp_group.size() == 1:
            return None
        if mask_T is None:
            return max(tokens * self.tp_group.size(), 1)
        real = (~mask_T).sum().double()
        dist.all_reduce(real, group=self.tp_cp_group)
        return (real.clamp(min=1) * self.tp_group.size() / self.tp_cp_group.size()).float()


def chain_routers(routers: list[AdaMoERouter]) -> None:
    """Let each router add a learned map of the previous one's scores to its own (MoE++)."""
    chain = ScoreChain(len(routers))
    for place, router in enumerate(routers):
        router.join(chain, place)
