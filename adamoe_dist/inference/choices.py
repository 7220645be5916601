"""Multiple choice by likelihood: which choice a model finds most likely after the question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adamoe_dist.errors import UserError
from adamoe_dist.inference.expert_use import ExpertUse
from adamoe_dist.inference.intervals import accuracy_report
from adamoe_dist.inference.items import Item
from adamoe_dist.inference.opening import OpenedModel
from adamoe_dist.inference.scoring import TokenSequence, score_sequences

NORMALISATIONS = ("sum", "characters", "bytes", "tokens")
"""What a choice's log-likelihood is divided by: nothing, or its length in one of three units."""


@dataclass(frozen=True)
class ItemScore:
    """What a model says about one item.

    Attributes:
        item: the item.
        log_likelihoods: of each choice, in nats.
        tokens: of each choice.
    """

    item: Item
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]

    def chosen(self, normalisation: str) -> int:
        """Return the position of the most likely choice, the first among equals."""
        lengths = {
            "sum": [1] * len(self.tokens),
            "characters": [len(choice) for choice in self.item.choices],
            "bytes": [len(choice.encode()) for choice in self.item.choices],
            "tokens": self.tokens,
        }[normalisation]
        scores = [value / length for value, length in zip(self.log_likelihoods, lengths, strict=True)]
        return scores.index(max(scores))

    def is_right(self, normalisation: str) -> bool:
        """Tell whether the most likely choice is the right one."""
        return self.chosen(normalisation) == self.item.answer

    def as_record(self) -> dict[str, Any]:
        """The score as plain values."""
        return {
            "id": self.item.id,
            "answer": self.item.answer,
            "chosen": {name: self.chosen(name) for name in NORMALISATIONS},
            "log_likelihoods": list(self.log_likelihoods),
            "tokens": list(self.tokens),
        }


def encode_pair(tokenizer: Any, context: str, continuation: str, prefix_id: int) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, cut where lm-evaluation-harness cuts.

    Both together are encoded, and what exceeds the context's own encoding is the continuation; spaces at the context's
    end go to the continuation, since tokens begin with spaces. A context
    that is empty, or that the tokenizer drops, is ``prefix_id``.
    """
    bare, whole_text = context.rstrip(), context + continuation
    before = tokenizer.encode(bare) if bare else []
    if not before:
        ids = tokenizer.encode(whole_text, add_special_tokens=False)
        return ([prefix_id], ids) if ids[:1] != [prefix_id] else (ids[:1], ids[1:])
    return before, tokenizer.encode(whole_text)[len(before) :]


def item_sequences(opened: OpenedModel, item: Item) -> list[TokenSequence]:
    """Return what the model reads for each choice.

    A space joins context and choice unless the context ends in white space. A context that is too long loses its
    beginning. The tokens of the context are counted once, with the first choice.

    Raises:
        UserError: a choice has no tokens, or more than the model can read.
    """
    joint = "" if item.context[-1:].isspace() else " "
    sequences = []
    for number, choice in enumerate(item.choices):
        context_ids, choice_ids = encode_pair(opened.tokenizer, item.context, joint + choice, opened.prefix_id)
        if not choice_ids or len(choice_ids) > opened.context:
            raise UserError(
                f"{item.id}: choice {number} has {len(choice_ids)} tokens; the model reads 1 to {opened.context}, so "
                "shorten or remove it"
            )
        ids = (context_ids + choice_ids)[-(opened.context + 1) :]
        first_scored = len(ids) - len(choice_ids)
        sequences.append(TokenSequence(tuple(ids), first_scored, 0 if number == 0 else first_scored))
    return sequences


def score_items(
    opened: OpenedModel,
    items: Sequence[Item],
    batch_size: int,
    use: ExpertUse | None = None,
    on_scored: Callable[[int], Any] = lambda count: None,
) -> list[ItemScore]:
    """Score every choice of every item.

    Args:
        opened: the model.
        items: the questions.
        batch_size: choices at a time.
        use: counts experts; a context once, and each choice's tokens but the last, which nothing follows.
        on_scored: told how many choices were scored, for progress.
    """
    sequences = [item_sequences(opened, item) for item in items]
    scores = iter(score_sequences(opened, [one for group in sequences for one in group], batch_size, use, on_scored))
    results = []
    for item, group in zip(items, sequences, strict=True):
        log_likelihoods = tuple(float(next(scores).log_likelihoods.sum()) for _ in group)
        results.append(ItemScore(item, log_likelihoods, tuple(len(one.ids) - one.first_scored for one in group)))
    return results


def choices_report(scores: Sequence[ItemScore]) -> dict[str, Any]:
    """Return the accuracy under each normalisation, with its standard error and interval."""
    return {
        "items": len(scores),
        "choices": sum(len(score.tokens) for score in scores),
        "accuracy": {name: accuracy_report([score.is_right(name) for score in scores]) for name in NORMALISATIONS},
    }
