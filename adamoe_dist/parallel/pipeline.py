"""One step's forward and backward passes, over one pipeline stage or many (1F1B, arXiv 2006.09503)."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel.engine import TrainingEngine


class Schedule:
    """Runs the micro-batches of a step through this rank's stage.

    Stage s of P keeps P - s micro-batches in flight at most: it starts with P - 1 - s forward passes, then takes one
    forward and one backward in turn, and ends with the backward passes that are left. With one stage that is forward
    and backward in turn.
    """

    def __init__(self, engine: TrainingEngine, model: LanguageModel, dtype: torch.dtype, device: torch.device) -> None:
        """Schedule ``model`` under ``engine``; stages exchange tensors of ``dtype`` on ``device``."""
        self._engine, self._model = engine, model
        self._neighbours = Neighbours(dtype, device)

    def run(self, micro_batches: Sequence[Tensor], padding_masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """Add the gradients of a step.

        Args:
            micro_batches: tokens (B, S + 1) each, the same on all stages.
            padding_masks: (B, S) each, or None.

        Returns:
            The mean loss over the micro-batches of this rank's part of the sequences, 0-d fp32; 0 on a stage that is
            not the last.
        """
        count, around = len(micro_batches), self._neighbours
        masks = padding_masks or [None] * count
        warm_up = min(around.stages - 1 - around.stage, count)
        in_flight: list[tuple[Tensor | None, Tensor]] = []
        total = torch.zeros((), device=around.device)
        self._engine.start_step(count)

        def forward(index: int, hidden: Tensor | None) -> Tensor:
            output = self._engine(micro_batches[index], masks[index], hidden)
            if self._model.is_last_stage:
                output = output.mean()
                total.add_(output.detach() / count)
            in_flight.append((hidden, output))
            return output

        def backward(gradient: Tensor | None) -> Tensor | None:
            hidden, output = in_flight.pop(0)
            if gradient is None:
                self._engine.backward(output)
            else:
                self._engine.backward_from(output, gradient)
            return None if hidden is None else hidden.grad

        def shape(index: int) -> tuple[int, ...]:
            batch, length = micro_batches[index].shape
            return self._model.hidden_shape(batch, length - 1)

        for index in range(warm_up):
            around.send_forward(forward(index, around.receive_forward(shape(index))))
        hidden = around.receive_forward(shape(warm_up)) if warm_up < count else None
        for index in range(warm_up, count):
            gradient = around.send_forward_receive_backward(forward(index, hidden))
            following = shape(index + 1) if index + 1 < count else None
            hidden = around.send_backward_receive_forward(backward(gradient), following)
        for _ in range(warm_up):
            around.send_backward(backward(around.receive_backward(in_flight[0][1])))
        return total

    def losses(self, tokens: Tensor) -> Tensor | None:
        """Return the last stage's losses of tokens (B, S + 1) there, without gradients; None elsewhere. Collective."""
        batch, length = tokens.shape
        return self._through_stages(self._model, tokens, self._model.hidden_shape(batch, length - 1))

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

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
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
        if tensor is not None:
            operations.append(dist.P2POp(dist.isend, tensor.detach().contiguous(), peer, self._group))
        if shape is not None:
            received = torch.empty(shape, dtype=self.dtype, device=self.device)
            operations.append(dist.P2POp(dist.irecv, received, peer, self._group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return None if received is None else received.requires_grad_()
