"""Counts what the routers of a transformers model do with the tokens that it reads.

Axes: B sequences, S positions, T = B x S tokens, E true experts, K selected slots, L = K + 1 loads from 0 to k.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Told by name, so that the copy of the classes that lies beside exported weights counts as well.
ADAMOE_ROUTER, FAMILY_ROUTER = "AdaMoERouter", "TopKRouter"


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


@contextlib.contextmanager
def count_experts(model: Any) -> Iterator[ExpertUse]:
    """Count what the routers of ``model`` select, in the tokens that ``mask_BS`` of the result names."""
    use = ExpertUse()
    handles = []
    for name, router in _routers(model):
        num_true, top_k = _sizes(router)
        loads_L, counts_E = torch.zeros(top_k + 1, dtype=torch.int64), torch.zeros(num_true, dtype=torch.int64)
        layer = LayerUse(name, loads_L, counts_E)
        use.layers.append(layer)
        handles.append(router.register_forward_hook(_hook(use, layer)))
    try:
        yield use
    finally:
        for handle in handles:
            handle.remove()


def _hook(use: ExpertUse, layer: LayerUse) -> Any:
    num_true = len(layer.expert_counts_E)

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        use._add(layer, _true_experts(output, num_true))

    return hook


def _routers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the routers by name: AdaMoE's, and those of transformers' families, which all end in TopKRouter."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith((ADAMOE_ROUTER, FAMILY_ROUTER))
    ]


def _sizes(router: Any) -> tuple[int, int]:
    """Return the number of true experts and of slots."""
    if type(router).__name__ == ADAMOE_ROUTER:
        return int(router.config.num_experts), int(router.config.num_experts_per_tok)
    return int(router.num_experts), int(router.top_k)


def _true_experts(output: Any, num_true: int) -> Tensor:
    """Return which true experts each token chose, bool (T, E), from a router's output."""
    if hasattr(output[1], "selected_TA"):
        selected_TA: Tensor = output[1].selected_TA
        return selected_TA[:, :num_true]
    indices_TK = output[2]
    none_TE = torch.zeros(indices_TK.shape[0], num_true, dtype=torch.bool, device=indices_TK.device)
    return none_TE.scatter(1, indices_TK, True)


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
