"""Choices by likelihood against one choice at a time."""

import pytest
import torch

from adamoe_dist.errors import UserError
from adamoe_dist.inference import (
    NORMALISATIONS,
    Item,
    ItemScore,
    choices_report,
    count_experts,
    read_items,
    score_items,
)
from adamoe_dist.inference.choices import encode_pair
from tests.inference.conftest import FAMILIES
from tests.inference.tiny import QUESTIONS, write_lines


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return read_items(write_lines(tmp_path_factory.mktemp("items") / "items.jsonl", QUESTIONS * 2))


def slow_log_likelihood(opened, context: str, continuation: str) -> tuple[float, int]:
    """Log-likelihood of what the encoding of both has after the encoding of the context without trailing spaces."""
    whole = opened.tokenizer.encode(context + continuation)
    before = len(opened.tokenizer.encode(context.rstrip())) if context else 0
    if before == 0:
        whole, before = [opened.prefix_id, *opened.tokenizer.encode(continuation, add_special_tokens=False)], 1
    logits_SV = torch.log_softmax(opened.model(torch.tensor([whole])).logits[0].double(), -1)
    return sum(logits_SV[at - 1, whole[at]].item() for at in range(before, len(whole))), len(whole) - before


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_choice_at_a_time(opened_models, items, family: str) -> None:
    opened = opened_models[family]
    scores = score_items(opened, items, batch_size=4)
    right = dict.fromkeys(NORMALISATIONS, 0)
    for item, score in zip(items, scores, strict=True):
        joint = "" if item.context.endswith(" ") else " "
        slow = [slow_log_likelihood(opened, item.context, joint + choice) for choice in item.choices]
        assert score.log_likelihoods == pytest.approx([value for value, _ in slow], abs=2e-4)
        assert score.tokens == tuple(length for _, length in slow)
        for name, lengths in {
            "sum": [1] * len(slow),
            "characters": [len(choice) for choice in item.choices],
            "bytes": [len(choice.encode("utf-8")) for choice in item.choices],
            "tokens": [length for _, length in slow],
        }.items():
            best = max(range(len(slow)), key=lambda at, by=lengths: slow[at][0] / by[at])
            assert score.chosen(name) == best
            right[name] += best == item.answer
    report = choices_report(scores)
    assert report["items"] == 10 and report["choices"] == sum(len(item.choices) for item in items)
    assert {name: report["accuracy"][name]["correct"] for name in NORMALISATIONS} == right


def test_a_context_is_counted_once_and_each_choice_by_itself(opened_models, items) -> None:
    opened = opened_models["adamoe"]
    with count_experts(opened.model) as use:
        score_items(opened, items[:5], 3, use)
    expected = 0
    for item in items[:5]:
        joint = "" if item.context.endswith(" ") else " "
        pairs = [
            encode_pair(opened.tokenizer, item.context, joint + choice, opened.prefix_id) for choice in item.choices
        ]
        expected += len(pairs[0][0]) + sum(len(choice_ids) - 1 for _, choice_ids in pairs)
    assert use.report(2)["tokens"] == expected


class Dropping:
    """A tokenizer that has only letters, each its own id, and begins texts with nothing."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text if letter.isalpha()]


def test_a_context_that_the_tokenizer_drops_is_an_empty_one() -> None:
    assert encode_pair(Dropping(), "12!", " ab", prefix_id=1) == ([1], [97, 98])
    assert encode_pair(Dropping(), "c!", " ab", prefix_id=1) == ([99], [97, 98])


def test_a_long_context_loses_its_beginning(opened_models) -> None:
    opened = opened_models["mixtral"]
    long = Item("long", "house door " * 60, ("the mat", "blue"), 0)
    [score] = score_items(opened, [long], 2)
    for number, choice in enumerate(long.choices):
        whole = opened.tokenizer.encode(long.context + choice)[-(opened.context + 1) :]
        logits_SV = torch.log_softmax(opened.model(torch.tensor([whole[:-1]])).logits[0].double(), -1)
        ids = whole[-score.tokens[number] :]
        start = len(whole) - len(ids)
        expected = sum(logits_SV[start + at - 1, token].item() for at, token in enumerate(ids))
        assert score.log_likelihoods[number] == pytest.approx(expected, abs=2e-4)


def test_a_choice_that_cannot_be_read_is_refused(opened_models) -> None:
    with pytest.raises(UserError, match=r"big: choice 1 has \d+ tokens; the model reads 1 to 64"):
        score_items(opened_models["mixtral"], [Item("big", "x", ("a", "b 🙂 " * 90), 0)], 2)


def test_the_first_of_equal_choices_is_chosen() -> None:
    score = ItemScore(Item("same", "It is", ("blue", "blue"), 1), (-9.75, -9.75), (2, 2))
    assert score.chosen("sum") == 0 and not score.is_right("tokens")
