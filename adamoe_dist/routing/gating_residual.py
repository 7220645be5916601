"""The way of the scores from one MoE layer's router to the next one's (MoE++'s gating residual).

Legend: T tokens, A true and null experts.
"""

from torch import Tensor


class ScoreChain:
    """Hands each router's scores to the next router inside one forward pass of the model.

    One object serves all routers of a model; they are numbered from 0. It holds one layer's scores at a time, and only
    until the next layer takes them: a layer that runs out of turn, as a recomputed one does in the backward pass, finds
    nothing and fails, instead of going on with scores of another layer or another batch.
    """

    def __init__(self, routers: int) -> None:
        """Make the chain of so many routers."""
        self.routers = routers
        self._from: int | None = None
        self._logits_TA: Tensor | None = None

    def give(self, index: int, logits_TA: Tensor) -> None:
        """Keep the scores (T, A) of router ``index`` for the next one; those of the last go nowhere."""
        if index + 1 < self.routers:
            self._from, self._logits_TA = index, logits_TA

    def take(self, index: int, tokens: int) -> Tensor:
        """Return what router ``index - 1`` gave for these tokens, and forget it."""
        logits_TA, source = self._logits_TA, self._from
        self._logits_TA = self._from = None
        assert logits_TA is not None and source == index - 1, (
            f"moe.router.gating_residual: router {index} runs, but the scores at hand are those of router {source}; "
            "layers must run in order, each once, and cannot be recomputed one by one"
        )
        assert logits_TA.shape[0] == tokens, (
            f"moe.router.gating_residual: router {index} has {tokens} tokens, router {source} had {logits_TA.shape[0]}"
        )
        return logits_TA
