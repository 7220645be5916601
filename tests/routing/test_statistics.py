import pytest
import torch

from adamoe_dist.routing import RoutingStatistics, nonfinite_tokens, routing_statistics, select

# Three true and two null experts, two slots; the last token is padding.
LOGITS_TA = torch.tensor(
    [
        [5.0, 4.0, 0.0, 1.0, 2.0],
        [0.0, 4.0, 1.0, 5.0, 2.0],
        [0.0, 1.0, 2.0, 5.0, 4.0],
        [1.0, 5.0, 4.0, 2.0, 0.0],
        [9.0, 8.0, 7.0, 6.0, 5.0],
    ]
)
PADDING_T = torch.tensor([False, False, False, False, True])


@pytest.mark.parametrize(("mask_select", "mask_count"), [(True, False), (False, True), (True, True)])
def test_statistics_equal_the_count_by_hand(mask_select, mask_count):
    selection = select(LOGITS_TA, 3, 2, "true_experts", PADDING_T if mask_select else None)
    statistics = routing_statistics(selection, PADDING_T if mask_count else None)
    assert statistics.real_tokens.item() == 4
    assert statistics.true_slots.item() == 5
    assert statistics.null_slots.item() == 3
    assert statistics.all_null_tokens.item() == 1
    assert statistics.expert_counts_E.tolist() == [1, 3, 1]
    assert statistics.tokens_by_load_L.tolist() == [1, 1, 2]


def test_packed_statistics_add_up_over_parts_of_a_batch():
    def packed(part: slice) -> torch.Tensor:
        return routing_statistics(select(LOGITS_TA[part], 3, 2, "true_experts", PADDING_T[part])).packed()

    total = RoutingStatistics.unpacked(packed(slice(0, 2)) + packed(slice(2, 5)), num_true=3)
    whole = RoutingStatistics.unpacked(packed(slice(0, 5)), num_true=3)
    assert torch.equal(total.packed(), whole.packed())
    assert total.null_slots.item() == 3


def test_no_tokens_and_no_null_experts():
    empty = routing_statistics(select(torch.zeros(0, 5), 3, 2, "true_experts"))
    assert empty.real_tokens.item() == empty.true_slots.item() == empty.null_slots.item() == 0
    vanilla = routing_statistics(select(LOGITS_TA, 5, 2, "true_experts"))
    assert (vanilla.real_tokens.item(), vanilla.true_slots.item(), vanilla.null_slots.item()) == (5, 10, 0)


def test_tokens_with_scores_that_are_not_finite_are_counted_once_and_padding_never():
    logits = LOGITS_TA.clone()
    assert nonfinite_tokens(logits).item() == 0
    logits[0, 1], logits[0, 2], logits[2, 4], logits[4, 0] = float("nan"), float("inf"), -float("inf"), float("nan")
    assert nonfinite_tokens(logits).item() == 3
    assert nonfinite_tokens(logits, PADDING_T).item() == 2
