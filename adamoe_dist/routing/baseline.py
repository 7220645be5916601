"""Megatron-core's own router, counted: the baseline of ``moe.router.type=topk``."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from adamoe_dist.routing.counters import RoutingCounters
from adamoe_dist.routing.losses import z_loss
from adamoe_dist.routing.statistics import nonfinite_tokens, score_entropy


class CountedTopKRouter(TopKRouter):
    """Megatron's router as it is; its losses are added to this layer's counters as well."""

    counters: RoutingCounters

    def gating(self, input: Tensor) -> Tensor:
        """Score as Megatron does, and count the scores' entropy and the tokens whose scores are not finite."""
        logits: Tensor = super().gating(input)
        if self.training and torch.is_grad_enabled():
            logits_TE = logits.reshape(-1, logits.shape[-1])
            self.counters.add_nonfinite(nonfinite_tokens(logits_TE))
            self.counters.add_score_entropy(score_entropy(logits_TE.float()))
        return logits

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *arguments: Any, **keywords: Any
    ) -> Tensor:
        """Attach the balance loss as Megatron does, and count it."""
        self.counters.add_balance_loss(aux_loss)
        attached: Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *arguments, **keywords
        )
        return attached

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss as Megatron does, and count it."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is not None and self.training and torch.is_grad_enabled():
            self.counters.add_z_loss(z_loss(logits, padding_mask) * coefficient / self.tp_cp_group.size())
        attached: Tensor = super().apply_z_loss(logits, padding_mask=padding_mask)
        return attached
