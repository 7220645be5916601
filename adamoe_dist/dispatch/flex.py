"""Megatron-core's flex dispatcher, over DeepEP or HybridEP, with null experts."""

import importlib

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.counts import DispatchCount, pairs_per_rank
from adamoe_dist.dispatch.exchange import Meanwhile
from adamoe_dist.errors import UserError

BUFFERS = {"deepep": "Buffer", "hybridep": "HybridEPBuffer"}
"""What each backend needs of the package ``deep_ep``."""


def flex_problem(backend: str) -> str | None:
    """Say why a flex backend cannot be used here, or return None where it can."""
    try:
        getattr(importlib.import_module("deep_ep"), BUFFERS[backend])
    except ImportError:
        return "the package deep_ep (DeepEP) is not installed"
    except AttributeError:
        return f"the installed deep_ep has no {BUFFERS[backend]}"
    return None if platform.is_cuda() else "DeepEP needs CUDA"


def check_flex(backend: str) -> None:
    """Refuse ``moe.dispatcher.type=flex`` where its library is missing.

    Raises:
        UserError: naming what is missing and the way out.
    """
    problem = flex_problem(backend)
    if problem:
        raise UserError(
            f"moe.dispatcher.type=flex with moe.dispatcher.flex_backend={backend}: {problem}; install it from "
            "https://github.com/deepseek-ai/DeepEP or use moe.dispatcher.type=alltoall"
        )


class FlexDispatcher(CountingDispatcher):
    """Megatron's flex dispatcher, given the true slots only.

    Megatron's DeepEP manager takes the k largest weights of each token for its experts and drops those of weight zero
    only where an expert capacity is set; without one, a token with fewer than k true experts would be sent to experts
    it did not choose. Here every slot that is not in the routing map has the id -1, which DeepEP sends nowhere.
    HybridEP reads the routing map itself.
    """

    overlaps = False

    def __init__(self, slot: DispatcherSlot) -> None:
        """Make the dispatcher of one MoE layer; the backend is ``moe_flex_dispatcher_backend`` of Megatron's config."""
        super().__init__(slot)
        first = self.placement.here * slot.num_local_experts
        self.megatrons = MoEFlexTokenDispatcher(
            slot.num_local_experts,
            list(range(first, first + slot.num_local_experts)),
            config=slot.config,
            pg_collection=slot.pg_collection,
        )

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Give the backend its metadata.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            ``(tokens (T, H), weights)``, of which the backend sends what the metadata says.
        """
        hidden_TH = self._tokens(hidden_states, routing_map, probs)
        self._row_type = hidden_TH.dtype
        probs = probs.masked_fill(~routing_map, 0.0)
        manager = self.megatrons._comm_manager
        manager.setup_metadata(routing_map, probs)
        if hasattr(manager, "token_indices"):
            manager.token_indices, manager.token_probs = true_slots(routing_map, probs, manager.router_topk)
        self.last_count = self._count(routing_map, self._row_bytes(hidden_TH))
        return hidden_TH, manager.token_probs

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let the backend send tokens and weights."""
        assert meanwhile is None, "this dispatcher waits for its rows"
        rows, weights = self.megatrons.token_dispatch(hidden_states.to(self.row_dtype or self._row_type), probs)
        return rows.to(self._row_type), weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        prepared: tuple[Tensor, Tensor, Tensor] = self.megatrons.dispatch_postprocess(hidden_states, probs)
        return prepared

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs into the order that travels back."""
        rows: Tensor = self.megatrons.combine_preprocess(hidden_states)
        return rows

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Let the backend return and sum the results."""
        rows: Tensor = self.megatrons.token_combine(hidden_states.to(self.row_dtype or self._row_type))
        return rows.to(self._row_type)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Restore the shape that was dispatched."""
        return hidden_states.view(self.hidden_shape)

    def _count(self, routing_map: Tensor, row_bytes: int) -> DispatchCount:
        """Count distinct (token, rank) pairs: DeepEP sends one row for each. Its own metadata is not counted."""
        rows_G = routing_map.reshape(-1, self.ep_size, self.num_local_experts).any(dim=-1).sum(dim=0)
        pairs_G = pairs_per_rank(routing_map, self.ep_size)
        bytes_G = rows_G * row_bytes + pairs_G * torch.float32.itemsize
        return DispatchCount.of(self.placement, rows_G, pairs_G, bytes_G)


def true_slots(routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return ids and weights (T, K) of each token's true experts; slots left over have id -1 and weight 0.

    Args:
        routing_map_TE: (T, E) bool, at most K true in a row.
        probs_TE: (T, E) weights, at least 0; a chosen expert may have weight 0.
        top_k: K.
    """
    keys_TE = probs_TE.detach().masked_fill(~routing_map_TE, -1.0)
    ids_TK = keys_TE.topk(top_k, dim=1).indices
    unused_TK = ~routing_map_TE.gather(1, ids_TK)
    return ids_TK.masked_fill(unused_TK, -1), probs_TE.gather(1, ids_TK).masked_fill(unused_TK, 0.0)
