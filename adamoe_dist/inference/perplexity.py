"""Perplexity of text: sliding windows over each document, in which every token is scored once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adamoe_dist.errors import UserError
from adamoe_dist.inference.expert_use import ExpertUse
from adamoe_dist.inference.opening import OpenedModel
from adamoe_dist.inference.scoring import TokenSequence, score_sequences

DEFAULT_CONTEXT = 2048


class Window(NamedTuple):
    """Positions of one pass through the model: reads [start, end), scores the predictions made at [first, end)."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class CutDocument:
    """One document, ready to be scored.

    Attributes:
        source: file, or file and line.
        tokens: its tokens.
        text_bytes: its bytes in UTF-8.
        unknown: tokens that stand for text that the tokenizer cannot write.
        windows: what the model reads.
    """

    source: str
    tokens: int
    text_bytes: int
    unknown: int
    windows: tuple[TokenSequence, ...]


def sliding_windows(length: int, context: int, stride: int) -> list[Window]:
    """Cut ``length`` positions into windows of at most ``context``; each position is scored in exactly one.

    The first window scores all that it reads. Each later one scores the next ``stride`` positions and reads as many
    before them as fit.
    """
    assert length >= 1 and 1 <= stride <= context, (length, context, stride)
    windows = [Window(0, 0, min(context, length))]
    while windows[-1].end < length:
        first = windows[-1].end
        end = min(first + stride, length)
        windows.append(Window(max(0, end - context), first, end))
    return windows


def check_windows(longest: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return the context and the stride, with defaults: what the models read but no more than 2048, and half of it.

    Args:
        longest: tokens that the models can read.
        context: as it was given.
        stride: as it was given.

    Raises:
        UserError: a model cannot read so much, or the stride leaves tokens out.
    """
    chosen = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= chosen <= longest:
        raise UserError(f"--context {chosen}: the model reads 1 to {longest} tokens; give a number of these")
    step = max(chosen // 2, 1) if stride is None else stride
    if not 1 <= step <= chosen:
        raise UserError(f"--stride {step}: give 1 to {chosen}, the context, so that each token is scored once")
    return chosen, step


def cut_document(opened: OpenedModel, text: str, source: str, context: int, stride: int) -> CutDocument:
    """Cut a document into windows; before its first token stands the tokenizer's beginning (or end) of text.

    Args:
        opened: the model and its tokenizer.
        text: the document.
        source: where it came from.
        context: positions that the model reads at once.
        stride: positions that each window after the first scores.

    Raises:
        UserError: the text has no tokens.
    """
    # As in training, the names of special tokens inside a text are text.
    ids = opened.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not ids:
        raise UserError(f"{source} has no text that the tokenizer keeps; leave it out")
    whole = (opened.prefix_id, *ids)
    windows = tuple(
        TokenSequence(whole[start : end + 1], first - start + 1, first - start)
        for start, first, end in sliding_windows(len(ids), context, stride)
    )
    return CutDocument(source, len(ids), len(text.encode()), ids.count(opened.tokenizer.unk_token_id), windows)


def score_documents(
    opened: OpenedModel,
    documents: Sequence[CutDocument],
    batch_size: int,
    use: ExpertUse | None = None,
    on_scored: Callable[[int], Any] = lambda count: None,
) -> list[float]:
    """Return minus the log-likelihood of each document's text, in nats.

    Args:
        opened: the model.
        documents: from :func:`cut_document`.
        batch_size: windows at a time.
        use: counts experts; each token once, in the window that scores what follows it.
        on_scored: told how many windows were scored, for progress.
    """
    sequences = [window for document in documents for window in document.windows]
    scores = iter(score_sequences(opened, sequences, batch_size, use, on_scored))
    return [-math.fsum(float(next(scores).log_likelihoods.sum()) for _ in document.windows) for document in documents]


def text_report(documents: Sequence[CutDocument], nats: Sequence[float]) -> dict[str, Any]:
    """Return totals over documents: nats and bits a token and a byte, and the perplexity of a token."""
    total = math.fsum(nats)
    tokens, text_bytes = sum(one.tokens for one in documents), sum(one.text_bytes for one in documents)
    return {
        "documents": len(documents),
        "tokens": tokens,
        "bytes": text_bytes,
        "nats": total,
        "nats_per_token": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "nats_per_byte": total / text_bytes,
        "bits_per_byte": total / text_bytes / math.log(2),
        "unknown_tokens": sum(one.unknown for one in documents),
    }
