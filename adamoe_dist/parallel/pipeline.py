"""One step's forward and backward passes, over one pipeline stage or many (1F1B, arXiv 2006.09503)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from adamoe_dist.data import MicroBatch
from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel.engine import TrainingEngine
from adamoe_dist.timing import BACKWARD, FORWARD, PIPELINE, Ranges


@dataclass(frozen=True, eq=False)
class Weighting:
    """What each token's loss, and each micro-batch's auxiliary losses, weigh in a step whose tokens do not all count.

    The loss of a step is its sum over the tokens that count in the global batch, over their number, however the batch
    is cut. The auxiliary losses of a micro-batch are means over its real tokens; they weigh as its part of the real
    tokens of the global batch. Factors are relative to the mean over micro-batches and ranks, which the engine takes.

    Attributes:
        per_token: 0-d, factor of the loss of each token that counts.
        auxiliary_losses: 0-d, factor of those of each micro-batch.
    """

    per_token: Tensor
    auxiliary_losses: Sequence[Tensor]

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> "Weighting":
        """Count the tokens of the global batch. Collective over the ranks that train on samples of their own."""
        real = [batch.real_tokens for batch in micro_batches]
        totals = torch.stack([sum_of([batch.loss_tokens for batch in micro_batches]), sum_of(real)])
        group = parallel_state.get_data_parallel_group(with_context_parallel=False)
        dist.all_reduce(totals, group=group)
        loss_tokens, real_tokens = totals.double().clamp(min=1)
        batches = len(micro_batches) * dist.get_world_size(group)
        ranks_of_a_sequence = parallel_state.get_context_parallel_world_size()
        per_token = batches * ranks_of_a_sequence / loss_tokens
        return cls(per_token.float(), [(batches * tokens / real_tokens).float() for tokens in real])


def sum_of(counts: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors."""
    return torch.stack(list(counts)).sum()


class Schedule:
    """Runs the micro-batches of a step through this rank's stage.

    Stage s of P keeps P - s micro-batches in flight at most: it starts with P - 1 - s forward passes, then takes one
    forward and one backward in turn, and ends with the backward passes that are left. With one stage that is forward
    and backward in turn.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        model: LanguageModel,
        dtype: torch.dtype,
        device: torch.device,
        ranges: Ranges | None = None,
    ) -> None:
        """Schedule ``model`` under ``engine``; stages exchange tensors of ``dtype`` on ``device``.

        ``ranges`` are told of the passes and of the exchange.
        """
        self._engine, self._model = engine, model
        self._ranges = ranges or Ranges()
        self._neighbours = Neighbours(dtype, device, self._ranges)

    def run(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Add the gradients of a step.

        Where samples have masks, all of them have, and the loss is weighted as :class:`Weighting` says; else it is the
        mean over all tokens.

        Args:
            micro_batches: the same on all stages.

        Returns:
            The mean loss over the micro-batches of this rank's part of the sequences, 0-d fp32; 0 on a stage that is
            not the last. With masks: this rank's part of the loss, such that the mean over ranks is the loss.
        """
        count, around = len(micro_batches), self._neighbours
        warm_up = min(around.stages - 1 - around.stage, count)
        in_flight: list[tuple[int, Tensor | None, Tensor]] = []
        total = torch.zeros((), device=around.device)
        self._engine.start_step(count)
        weighting = Weighting.of(micro_batches) if micro_batches[0].counts_tokens else None

        def weigh_auxiliary_losses(index: int) -> None:
            if weighting is not None:
                self._engine.weigh_auxiliary_losses(weighting.auxiliary_losses[index])

        def forward(index: int, hidden: Tensor | None) -> Tensor:
            batch = micro_batches[index]
            weigh_auxiliary_losses(index)
            with self._ranges(FORWARD):
                output = self._engine(batch.tokens, batch.padding_mask, hidden)
                if self._model.is_last_stage:
                    if weighting is None:
                        output = output.mean()
                    else:
                        assert batch.loss_mask is not None, "samples with and without masks in one step"
                        own_mask = self._model.own_part(batch.loss_mask)
                        output = torch.where(own_mask, output, 0.0).sum() * weighting.per_token
                    total.add_(output.detach() / count)
            in_flight.append((index, hidden, output))
            return output

        def backward(gradient: Tensor | None) -> Tensor | None:
            index, hidden, output = in_flight.pop(0)
            weigh_auxiliary_losses(index)
            with self._ranges(BACKWARD):
                if gradient is None:
                    self._engine.backward(output)
                else:
                    self._engine.backward_from(output, gradient)
            return None if hidden is None else hidden.grad

        def shape(index: int) -> tuple[int, ...]:
            batch, length = micro_batches[index].tokens.shape
            return self._model.hidden_shape(batch, length - 1)

        for index in range(warm_up):
            around.send_forward(forward(index, around.receive_forward(shape(index))))
        hidden = around.receive_forward(shape(warm_up)) if warm_up < count else None
        for index in range(warm_up, count):
            gradient = around.send_forward_receive_backward(forward(index, hidden))
            following = shape(index + 1) if index + 1 < count else None
            hidden = around.send_backward_receive_forward(backward(gradient), following)
        for _ in range(warm_up):
            around.send_backward(backward(around.receive_backward(in_flight[0][2])))
        return total

    def losses(self, batch: MicroBatch) -> Tensor | None:
        """Return the last stage's losses of a batch there, without gradients; None elsewhere. Collective."""
        samples, length = batch.tokens.shape
        shape = self._model.hidden_shape(samples, length - 1)
        return self._through_stages(partial(self._model, padding_mask=batch.padding_mask), batch.tokens, shape)

    @torch.no_grad()
    def next_token_scores(self, tokens: Tensor, vocab_size: int) -> Tensor:
        """Return the scores (vocab_size,), fp32, of the token that follows ``tokens`` (1, S), on all ranks. Collective.

        All data-parallel ranks must be given the same tokens.
        """
        length, ranks = tokens.shape[1], self._model.sequence_ranks
        padded = torch.nn.functional.pad(tokens, (0, -length % ranks))
        shape = self._model.hidden_shape(*padded.shape)
        scores = self._through_stages(self._model.logits, padded, shape)
        total_V = torch.zeros(vocab_size, device=self._neighbours.device)
        holder, place = divmod(length - 1, padded.shape[1] // self._model.context_ranks)
        is_first = parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
        if scores is not None and is_first and self._model.context_rank == holder:
            total_V += scores[0, place, :vocab_size]
        dist.all_reduce(total_V)
        return total_V

    @torch.no_grad()
    def _through_stages(self, compute: Callable[..., Tensor], tokens: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        output = compute(tokens, hidden=self._neighbours.receive_forward(shape))
        if self._model.is_last_stage:
            return output
        self._neighbours.send_forward(output)
        return None


class Neighbours:
    """The stages before and after this one; at the pipeline's ends there is nothing to send or to receive.

    Sends and receives of one moment are given to the backend together, because two stages that send to each other first
    would wait for ever on NCCL.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, ranges: Ranges) -> None:
        self.dtype, self.device = dtype, device
        self._ranges = ranges
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        self.stage, self.stages = dist.get_rank(group), len(ranks)
        self._group = group
        self._before = ranks[self.stage - 1] if self.stage > 0 else None
        self._after = ranks[self.stage + 1] if self.stage + 1 < self.stages else None

    def receive_forward(self, shape: tuple[int, ...]) -> Tensor | None:
        """Wait for the hidden states of the stage before."""
        return self._exchange(None, self._before, shape)

    def send_forward(self, output: Tensor) -> None:
        """Give hidden states to the stage after."""
        self._exchange(output, self._after, None)

    def receive_backward(self, output: Tensor) -> Tensor | None:
        """Wait for the gradient of what this stage gave the stage after."""
        return self._exchange(None, self._after, tuple(output.shape))

    def send_backward(self, gradient: Tensor | None) -> None:
        """Give the stage before the gradient of what it gave."""
        self._exchange(gradient, self._before, None)

    def send_forward_receive_backward(self, output: Tensor) -> Tensor | None:
        """Give hidden states to the stage after and wait for a gradient from it."""
        return self._exchange(output, self._after, tuple(output.shape))

    def send_backward_receive_forward(self, gradient: Tensor | None, shape: tuple[int, ...] | None) -> Tensor | None:
        """Give a gradient to the stage before and, with a ``shape``, wait for its next hidden states."""
        return self._exchange(gradient, self._before, shape)

    def _exchange(self, tensor: Tensor | None, peer: int | None, shape: tuple[int, ...] | None) -> Tensor | None:
        if peer is None:
            return None
        operations, received = [], None
        with self._ranges(PIPELINE):
            if tensor is not None:
                operations.append(dist.P2POp(dist.isend, tensor.detach().contiguous(), peer, self._group))
            if shape is not None:
                received = torch.empty(shape, dtype=self.dtype, device=self.device)
                operations.append(dist.P2POp(dist.irecv, received, peer, self._group))
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return None if received is None else received.requires_grad_()
