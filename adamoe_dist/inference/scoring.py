"""Log-likelihoods of tokens: sequences in batches padded on the right, with exact masks.

Axes: B sequences, S positions, P positions whose logits are computed, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamoe_dist.errors import UserError
from adamoe_dist.inference.expert_use import ExpertUse
from adamoe_dist.inference.opening import OpenedModel, not_finite


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of which the last ones are scored.

    Attributes:
        ids: token ids; the last one is scored only, and not read.
        first_scored: position of the first token that is scored, at least 1.
        first_counted: position of the first token whose experts are counted; all later ones that are read are too.
    """

    ids: tuple[int, ...]
    first_scored: int
    first_counted: int = 0

    def __post_init__(self) -> None:
        assert 1 <= self.first_scored < len(self.ids), self
        assert 0 <= self.first_counted < len(self.ids), self


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model says about the scored tokens of one sequence.

    Attributes:
        log_likelihoods: natural logarithms of their probabilities, fp64 (scored,), on the CPU.
        is_greedy: whether each of them is the model's most likely one.
    """

    log_likelihoods: Tensor
    is_greedy: bool


@torch.inference_mode()
def score_sequences(
    opened: OpenedModel,
    sequences: Sequence[TokenSequence],
    batch_size: int,
    use: ExpertUse | None = None,
    on_scored: Callable[[int], Any] = lambda count: None,
) -> list[TokenScores]:
    """Score sequences, the longest first, so that little is padded and memory runs out early if at all.

    Args:
        opened: the model.
        sequences: what to score.
        batch_size: sequences at a time.
        use: counts experts, from :func:`count_experts` over the same model.
        on_scored: told how many sequences were scored, for progress.

    Returns:
        The scores, in the order of ``sequences``.

    Raises:
        UserError: a log-likelihood is NaN or infinite, or the GPU's memory is too small.
    """
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].ids), sequences[index].ids))
    scores: dict[int, TokenScores] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [sequences[index] for index in chosen]
        try:
            scored = _score_batch(opened, batch, use)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch-size {batch_size}: so many sequences of up to {len(batch[0].ids)} tokens do not fit into the "
                "GPU's memory; give fewer, or a shorter --context"
            ) from error
        scores.update(zip(chosen, scored, strict=True))
        on_scored(len(chosen))
    return [scores[index] for index in range(len(sequences))]


def _score_batch(opened: OpenedModel, batch: list[TokenSequence], use: ExpertUse | None) -> list[TokenScores]:
    length = max(len(sequence.ids) for sequence in batch) - 1
    ids_BS = torch.zeros(len(batch), length, dtype=torch.int64)
    real_BS, counted_BS = torch.zeros(2, len(batch), length, dtype=torch.bool)
    for row, sequence in enumerate(batch):
        end = len(sequence.ids) - 1
        ids_BS[row, :end] = torch.tensor(sequence.ids[:-1])
        real_BS[row, :end] = True
        counted_BS[row, sequence.first_counted : end] = True
    if use is not None:
        use.mask_BS = counted_BS.to(opened.device)
    # Logits are by far the largest tensor: only of positions that some row needs.
    first = min(sequence.first_scored for sequence in batch) - 1
    logits_BPV = opened.model(
        input_ids=ids_BS.to(opened.device),
        attention_mask=real_BS.to(opened.device).long(),
        use_cache=False,
        logits_to_keep=length - first,
    ).logits
    return [_scores_of(opened, logits_BPV[row], sequence, first) for row, sequence in enumerate(batch)]


def _scores_of(opened: OpenedModel, logits_PV: Tensor, sequence: TokenSequence, first: int) -> TokenScores:
    needed_PV = logits_PV[sequence.first_scored - 1 - first : len(sequence.ids) - 1 - first].float()
    targets_P = torch.tensor(sequence.ids[sequence.first_scored :], device=needed_PV.device)
    chosen_P = needed_PV.gather(1, targets_P[:, None])[:, 0]
    log_likelihoods_P = chosen_P - needed_PV.logsumexp(dim=1)
    if not log_likelihoods_P.isfinite().all():
        raise UserError(not_finite(opened))
    greedy = bool((needed_PV.argmax(dim=1) == targets_P).all())
    return TokenScores(log_likelihoods_P.double().cpu(), greedy)
