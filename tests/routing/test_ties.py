"""Equal scores: the lowest column wins, whatever the batch, the threads and the ranks."""

import pytest
import torch

from adamoe_dist.routing import ranked_top_k, select

MODES = ("true_experts", "all_selected", "none")


def coarse_scores(tokens, experts, dtype=torch.float32, seed=0):
    """Scores of few values, with zeros of both signs, so that every row has ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator).mul(2).round().div(2)
    signs = torch.where(torch.rand(tokens, experts, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(scores == 0, 0.0 * signs, scores).to(dtype)


def by_hand(row, k):
    return sorted(range(len(row)), key=lambda column: (-row[column], column))[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 5, 16, 72, 128])
def test_the_lowest_column_of_equals_wins(experts, dtype):
    scores = coarse_scores(50, experts, dtype)
    assert experts < 5 or (scores.signbit() & (scores == 0)).any()
    for k in {1, (experts + 1) // 2, experts}:
        assert ranked_top_k(scores, k).tolist() == [by_hand(row, k) for row in scores.tolist()]


def test_the_order_of_all_fp32_values_is_kept():
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [float("inf"), huge, 1.0, tiny, 1e-45, 0.0, -1e-45, -tiny, -1.0, -huge, -float("inf")]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    scores = torch.tensor(values)[order].unsqueeze(0)
    assert torch.equal(scores.gather(1, ranked_top_k(scores, len(values)))[0], torch.tensor(values))


@pytest.mark.parametrize("mode", MODES)
def test_equal_logits_go_to_true_experts_first(mode):
    chosen = select(torch.zeros(7, 12), 8, 3, mode)
    assert chosen.top_indices_TK.tolist() == [[0, 1, 2]] * 7
    exact_copies = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 3)
    assert select(exact_copies, 8, 3, mode).routing_map_TE.sum(dim=1).eq(1).all()


@pytest.mark.parametrize("shards", [2, 3, 8, 96])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", MODES)
def test_selection_on_the_parts_of_a_batch_is_that_on_the_whole(mode, function, shards):
    """Ranks see parts: scores tie within and across rows, with a bias and without."""
    bias = 0.25 * coarse_scores(1, 20)[0]
    plain = torch.randn(96, 24, generator=torch.Generator().manual_seed(4)) * 3
    for logits in (coarse_scores(96, 24), plain):
        for bias_E in (None, bias):
            whole = select(logits, 20, 5, mode, score_function=function, bias_E=bias_E)
            parts = [
                select(part.clone(), 20, 5, mode, score_function=function, bias_E=bias_E)
                for part in logits.tensor_split(shards)
            ]
            assert torch.equal(torch.cat([part.top_indices_TK for part in parts]), whole.top_indices_TK)
            weights = torch.cat([part.probs_TE for part in parts])
            torch.testing.assert_close(weights, whole.probs_TE, rtol=0 if function == "softmax" else 1e-6, atol=0)


def test_selection_does_not_depend_on_the_number_of_threads():
    logits = torch.cat((coarse_scores(3000, 24), torch.randn(3000, 24)))
    before = torch.get_num_threads()
    try:
        chosen = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            chosen.append(select(logits, 20, 5, "true_experts", score_function="sigmoid", bias_E=torch.zeros(20)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other.top_indices_TK, chosen[0].top_indices_TK) for other in chosen)
