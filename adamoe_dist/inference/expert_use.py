"""Counts what the routers of a transformers model do with the tokens that it reads.

Axes: B sequences, S positions, T = B x S tokens, E true experts, A all experts (null ones last), K selected slots, L =
K + 1 loads from 0 to k.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Told by name, so that the copy of the classes that lies beside exported weights counts as well.
ADAMOE_ROUTER, FAMILY_ROUTER = "AdaMoERouter", "topkrouter"


@dataclass(eq=False)
class LayerUse:
    """Sums over the counted tokens of one MoE layer.

    Attributes:
        name: the router module's name in the model.
        tokens_by_load_L: tokens that chose 0, 1, ..., k true experts, int64 (k + 1,).
        expert_counts_E: tokens that chose each true expert, int64 (E,).
    """

    name: str
    tokens_by_load_L: Tensor
    expert_counts_E: Tensor

    def summary(self) -> dict[str, Any]:
        """The layer's load and shares as plain values."""
        return _summary(self.tokens_by_load_L, [self.expert_counts_E]) | {
            "router": self.name,
            "tokens_by_load": self.tokens_by_load_L.tolist(),
            "expert_counts": self.expert_counts_E.tolist(),
        }


@dataclass(eq=False)
class ExpertUse:
    """What the routers did with every token that was counted, by layer.

    Attributes:
        mask_BS: which tokens of the next forward pass count, bool (B, S); None: none of them.
        layers: the MoE layers in the model's order; empty for a dense model.
    """

    mask_BS: Tensor | None = None
    layers: list[LayerUse] = field(default_factory=list)

    def report(self, reference_top_k: int | None) -> dict[str, Any] | None:
        """Return shares over all layers and of each; None where the model has no router that is known.

        ``true_experts_per_token`` is the load, ``null_share`` the part of the slots that null experts took,
        ``all_null_share`` the part of the tokens with no true expert, each a mean over tokens and layers, and
        ``expert_flops_saved`` is 1 - load / ``reference_top_k``.
        """
        if not self.layers:
            return None
        longest = max(len(layer.tokens_by_load_L) for layer in self.layers)
        tokens_by_load_L = torch.stack(
            [_padded(layer.tokens_by_load_L.cpu(), longest) for layer in self.layers]
        ).sum(dim=0)  # fmt: skip
        overall = _summary(tokens_by_load_L, [layer.expert_counts_E.cpu() for layer in self.layers])
        if reference_top_k:
            overall["reference_top_k"] = reference_top_k
            overall["expert_flops_saved"] = 1.0 - overall["true_experts_per_token"] / reference_top_k
        overall["tokens"] //= len(self.layers)
        return overall | {"layers": [layer.summary() for layer in self.layers]}

    def _add(self, layer: LayerUse, true_TE: Tensor) -> None:
        if self.mask_BS is None:
            return
        mask_T = self.mask_BS.reshape(-1).to(true_TE.device)
        assert mask_T.shape[0] == true_TE.shape[0], (mask_T.shape, true_TE.shape)
        counted_TE = true_TE[mask_T]
        loads_L = torch.bincount(counted_TE.sum(dim=1), minlength=len(layer.tokens_by_load_L))
        layer.tokens_by_load_L += loads_L.cpu()
        layer.expert_counts_E += counted_TE.sum(dim=0).cpu()


class RouterChoice(NamedTuple):
    """What one router decided about the tokens of one forward pass.

    Attributes:
        selected_TE: the true experts of each token, bool.
        weights_TE: their combine weights, 0 where not selected.
    """

    selected_TE: Tensor
    weights_TE: Tensor


class WatchedRouter(NamedTuple):
    """A router by its name in the model, with its numbers of true experts, of null experts and of slots."""

    name: str
    num_true: int
    num_null: int
    top_k: int


def routers_of(model: Any) -> list[WatchedRouter]:
    """Return the routers of ``model`` that are known, in the model's order."""
    return [WatchedRouter(name, *_sizes(router)) for name, router in _routers(model)]


@contextlib.contextmanager
def watch_routers(model: Any, observe: Callable[[int, RouterChoice], None]) -> Iterator[None]:
    """Call ``observe(the router's place among routers_of(model), its choice)`` whenever a router of ``model`` runs."""
    handles = []
    for place, (_, router) in enumerate(_routers(model)):
        num_true, num_null, _ = _sizes(router)

        def hook(
            _module: nn.Module,
            _arguments: Any,
            output: Any,
            place: int = place,
            num_true: int = num_true,
            num_null: int = num_null,
        ) -> None:
            observe(place, _choice(output, num_true, num_null))

        handles.append(router.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def count_experts(model: Any) -> Iterator[ExpertUse]:
    """Count what the routers of ``model`` select, in the tokens that ``mask_BS`` of the result names."""
    use = ExpertUse()
    for router in routers_of(model):
        loads_L = torch.zeros(router.top_k + 1, dtype=torch.int64)
        use.layers.append(LayerUse(router.name, loads_L, torch.zeros(router.num_true, dtype=torch.int64)))
    with watch_routers(model, lambda place, choice: use._add(use.layers[place], choice.selected_TE)):
        yield use


def _routers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the routers by name: AdaMoE's, and those of transformers' families (TopKRouter or TopkRouter)."""
    return [(name, module) for name, module in model.named_modules() if _is_router(type(module).__name__)]


def _is_router(kind: str) -> bool:
    return kind == ADAMOE_ROUTER or kind.lower().endswith(FAMILY_ROUTER)


def _sizes(router: Any) -> tuple[int, int, int]:
    """Return the numbers of true experts, of null experts and of slots."""
    if type(router).__name__ == ADAMOE_ROUTER:
        config = router.config
        return int(config.num_experts), int(config.num_null_experts), int(config.num_experts_per_tok)
    num_true = int(router.num_experts)
    # LongCat-Flash's router scores "zero experts" behind the true ones.
    return num_true, int(getattr(router, "n_routed_experts", num_true)) - num_true, int(router.top_k)


def _choice(output: Any, num_true: int, num_null: int) -> RouterChoice:
    """Return what a router's output says about each token; families' routers give logits, weights and indices."""
    if hasattr(output[1], "selected_TA"):
        return RouterChoice(output[1].selected_TA[:, :num_true], output[1].weights_TE)
    scores_TK, indices_TK = output[1], output[2]
    none_TA = torch.zeros(indices_TK.shape[0], num_true + num_null, dtype=torch.bool, device=indices_TK.device)
    assert scores_TK.shape == indices_TK.shape, (scores_TK.shape, indices_TK.shape)
    weights_TA = none_TA.to(scores_TK.dtype).scatter(1, indices_TK, scores_TK)
    return RouterChoice(none_TA.scatter(1, indices_TK, True)[:, :num_true], weights_TA[:, :num_true])


def _padded(counts_L: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(counts_L, (0, length - counts_L.shape[0]))


def _summary(tokens_by_load_L: Tensor, counts: list[Tensor]) -> dict[str, Any]:
    top_k = tokens_by_load_L.shape[0] - 1
    tokens = int(tokens_by_load_L.sum())
    true_slots = sum(int(counts_E.sum()) for counts_E in counts)
    busiest = [int(counts_E.max()) * len(counts_E) / max(int(counts_E.sum()), 1) for counts_E in counts]
    return {
        "tokens": tokens,
        "true_experts_per_token": true_slots / max(tokens, 1),
        "null_share": 1.0 - true_slots / max(tokens * top_k, 1),
        "all_null_share": int(tokens_by_load_L[0]) / max(tokens, 1),
        "expert_load_max_over_mean": max(busiest),
    }
