"""What a selection did, as sums that can be added over micro-batches, ranks and layers.

Axes: T tokens, E true experts (n), A = true and null experts, K selected slots, L = K + 1 loads from 0 to k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adamoe_dist.routing.selection import Selection


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Sums over the real tokens of one or more selections, int64 on the selection's device.

    Attributes:
        tokens_by_load_L: Tokens that chose 0, 1, ..., k true experts (k + 1,).
        expert_counts_E: Tokens that chose each true expert (E,).
    """

    tokens_by_load_L: Tensor
    expert_counts_E: Tensor

    @property
    def real_tokens(self) -> Tensor:
        """Tokens that are not padding, 0-d."""
        return self.tokens_by_load_L.sum()

    @property
    def true_slots(self) -> Tensor:
        """Slots taken by true experts, 0-d."""
        return self.expert_counts_E.sum()

    @property
    def null_slots(self) -> Tensor:
        """Slots taken by null experts, 0-d."""
        top_k = self.tokens_by_load_L.shape[0] - 1
        return top_k * self.real_tokens - self.true_slots

    @property
    def all_null_tokens(self) -> Tensor:
        """Tokens that chose no true expert, 0-d."""
        return self.tokens_by_load_L[0]

    def packed(self) -> Tensor:
        """All sums in one int64 vector (k + 1 + E,), so that one collective reduces them."""
        return torch.cat((self.tokens_by_load_L, self.expert_counts_E))

    @classmethod
    def unpacked(cls, packed: Tensor, num_true: int) -> "RoutingStatistics":
        """The statistics that `packed` laid out.

        Args:
            packed: Vector (k + 1 + E,) of `packed`, perhaps reduced.
            num_true: Number of true experts n.

        Returns:
            Statistics that are views of the vector.
        """
        tokens_by_load_L, expert_counts_E = packed.split([packed.shape[0] - num_true, num_true])
        return cls(tokens_by_load_L, expert_counts_E)


@torch.no_grad()
def routing_statistics(selection: Selection, padding_mask_T: Tensor | None = None) -> RoutingStatistics:
    """Count where the slots of a selection went, without waiting for the device.

    Args:
        selection: The selection.
        padding_mask_T: Bool (T,), true for padding; needed only if `select` was not given it.

    Returns:
        Sums over the real tokens.
    """
    top_k = selection.top_indices_TK.shape[1]
    selected_TA = selection.selected_TA
    if padding_mask_T is not None:
        selected_TA = selected_TA & ~padding_mask_T.unsqueeze(1)
    real_T = selection.real_T if padding_mask_T is None else selection.real_T & ~padding_mask_T
    true_TE = selected_TA[:, : selection.num_true]
    tokens_by_load_L = torch.zeros(top_k + 1, dtype=torch.int64, device=selected_TA.device)
    tokens_by_load_L.scatter_add_(0, true_TE.sum(dim=1), real_T.long())
    return RoutingStatistics(tokens_by_load_L, true_TE.sum(dim=0))


@torch.no_grad()
def score_entropy(logits_TA: Tensor, padding_mask_T: Tensor | None = None) -> Tensor:
    """Return the entropy of each real token's softmax over all experts, true and null, summed: 0-d, nats.

    Args:
        logits_TA: The router's scores, without a selection bias.
        padding_mask_T: Bool (T,), true for padding.
    """
    # log sum exp(s) - sum p s: one pass less than by the logarithms of p.
    probs_TA = torch.softmax(logits_TA, dim=1)
    entropy_T = torch.logsumexp(logits_TA, dim=1) - torch.linalg.vecdot(probs_TA, logits_TA)
    if padding_mask_T is not None:
        entropy_T = entropy_T.masked_fill(padding_mask_T, 0.0)
    return entropy_T.sum()


@torch.no_grad()
def nonfinite_tokens(logits_TA: Tensor, padding_mask_T: Tensor | None = None) -> Tensor:
    """Count the real tokens with a NaN or infinite logit, 0-d int64, without waiting for the device.

    A sum is finite only if its terms are, and is cheaper than a test of each.
    """
    bad_T = ~torch.isfinite(logits_TA.sum(dim=1))
    if padding_mask_T is not None:
        bad_T = bad_T & ~padding_mask_T
    return bad_T.sum()
