"""What gradients need besides ZeRO's mean over data-parallel ranks: sums over tensor ranks, and the tied embedding."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from adamoe_dist.model import LanguageModel, is_tied_copy


def sum_over_tensor_ranks(model: torch.nn.Module) -> None:
    """Sum the gradients of weights that every tensor-parallel rank holds: each sees a part of the sequence.

    They are norms, routers, null experts' weights and the shared expert's gate, marked ``sequence_parallel``. The sum
    is made in fp32 as each gradient arrives, before it is accumulated, so that it is right in every ZeRO stage.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.float()
        total = total.clone() if total is gradient else total
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(summed)


class TiedEmbedding:
    """The embedding of a pipeline whose last stage uses it as output layer.

    The first stage owns it, with its master weight and moments. The last stage has a copy that no optimizer knows: its
    gradient is summed in fp32 over the micro-batches and sent to the first stage, which adds it to its own in its last
    backward pass; after the update the copy is sent back. So ZeRO sees one weight with its whole gradient in every
    stage, the norm counts it once, and the copies cannot drift apart.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Hook the embedding of ``model``; call it before the engine is built."""
        ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        self._first, self._last = ranks[0], ranks[-1]
        self._left = 0
        self._sum: Tensor | None = None
        self._sending: dist.Work | None = None
        self.owner = model.gpt.embedding.word_embeddings.weight if model.is_first_stage else None
        self.copy = next((p for p in model.parameters() if is_tied_copy(p)), None)
        self._is_trained = any(p is not None and p.requires_grad for p in (self.owner, self.copy))
        if self.owner is not None and self._is_trained:
            self.owner.register_hook(self._add_received)
        if self.copy is not None and self._is_trained:
            self.copy.register_post_accumulate_grad_hook(self._collect)

    def start_step(self, micro_batches: int) -> None:
        """Expect so many backward passes; none of a frozen embedding."""
        self._left = micro_batches if self._is_trained else 0
        self._sum = None

    def finish_step(self) -> None:
        """Bring the updated weight to the copy. The first and the last stage call it after the update."""
        assert self._left == 0, f"{self._left} backward passes are missing"
        if self._sending is not None:
            self._sending.wait()
            self._sending = None
        if self._is_trained:
            self.share()

    def share(self) -> None:
        """Bring the weight to the copy. The first and the last stage call it together."""
        if self.copy is not None:
            received = torch.empty_like(self.copy)
            dist.recv(received, src=self._first)
            with torch.no_grad():
                self.copy.copy_(received)
        elif self.owner is not None:
            dist.send(self.owner.detach().contiguous(), dst=self._last)

    @torch.no_grad()
    def _collect(self, copy: Tensor) -> None:
        assert copy.grad is not None
        self._sum = copy.grad.float() if self._sum is None else self._sum.add_(copy.grad)
        copy.grad = None
        self._left -= 1
        if self._left == 0:
            self._sending = dist.isend(self._sum.contiguous(), dst=self._first)

    def _add_received(self, gradient: Tensor) -> Tensor | None:
        self._left -= 1
        if self._left:
            return None
        received = torch.empty_like(gradient, dtype=torch.float32)
        dist.recv(received, src=self._last)
        return (gradient.float() + received).to(gradient.dtype)


def tied_embedding(model: LanguageModel, is_tied: bool) -> TiedEmbedding | None:
    """Return the object that keeps the two ends of a pipeline alike, on its ends where the embedding is tied."""
    is_end = model.is_first_stage != model.is_last_stage
    return TiedEmbedding(model) if is_tied and is_end else None
