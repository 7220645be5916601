"""Sliding windows, and text scored in them against one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamoe_dist.errors import UserError
from adamoe_dist.inference import check_windows, count_experts, cut_document, score_documents, text_report
from adamoe_dist.inference.perplexity import sliding_windows
from tests.inference.tiny import TEXT


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 60), context=st.integers(1, 20), data=st.data())
def test_each_position_is_scored_once_with_all_that_fits_before_it(length: int, context: int, data) -> None:
    stride = data.draw(st.integers(1, context))
    windows = sliding_windows(length, context, stride)
    assert [position for window in windows for position in range(window.first, window.end)] == list(range(length))
    for number, window in enumerate(windows):
        assert window.end - window.start <= context and window.start <= window.first
        assert window.start == 0 or window.end - window.start == context
        assert number == 0 or window.end - window.first <= stride


def slow_nats(opened, text: str, context: int, stride: int) -> float:
    """Each token from its own pass over what its window has before it."""
    ids = [opened.prefix_id, *opened.tokenizer.encode(text, add_special_tokens=False)]
    nats, end = 0.0, context
    for position in range(len(ids) - 1):
        while position >= end:
            end += stride
        start = max(0, min(end, len(ids) - 1) - context)
        logits_V = opened.model(torch.tensor([ids[start : position + 1]])).logits[0, -1].double()
        nats -= torch.log_softmax(logits_V, 0)[ids[position + 1]].item()
    return nats


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "adamoe"])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (64, 32)])
def test_text_is_scored_as_one_token_at_a_time(opened_models, family: str, context: int, stride: int) -> None:
    opened = opened_models[family]
    cut = [cut_document(opened, text, f"text {number}", context, stride) for number, text in enumerate(TEXT)]
    with count_experts(opened.model) as use:
        nats = score_documents(opened, cut, batch_size=3, use=use)
    expected = [slow_nats(opened, text, context, stride) for text in TEXT]
    assert nats == pytest.approx(expected, rel=1e-5)
    report = text_report(cut, nats)
    text_bytes = sum(len(text.encode()) for text in TEXT)
    tokens = sum(len(opened.tokenizer.encode(text, add_special_tokens=False)) for text in TEXT)
    assert (report["bytes"], report["tokens"], report["documents"]) == (text_bytes, tokens, 3)
    assert report["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / text_bytes, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(sum(expected) / tokens), rel=1e-4)
    assert use.report(2)["tokens"] == tokens


def test_documents_do_not_see_each_other(opened_models) -> None:
    opened = opened_models["adamoe"]

    def score(*texts: str) -> list[float]:
        return score_documents(opened, [cut_document(opened, text, "text", 32, 16) for text in texts], 2)

    assert score(*TEXT) == pytest.approx([score(text)[0] for text in reversed(TEXT)][::-1], rel=1e-6)


def test_windows_are_checked() -> None:
    assert check_windows(64, None, None) == (64, 32)
    assert check_windows(10**6, None, None) == (2048, 1024)
    assert check_windows(64, 1, None) == (1, 1)
    for context, stride, message in ((65, None, "--context 65"), (0, None, "--context 0"), (32, 33, "--stride 33")):
        with pytest.raises(UserError, match=message):
            check_windows(64, context, stride)


def test_text_that_the_tokenizer_drops_is_refused(opened_models) -> None:
    with pytest.raises(UserError, match=r"a\.txt has no text"):
        cut_document(opened_models["mixtral"], "", "a.txt", 8, 8)
