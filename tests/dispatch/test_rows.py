"""Rows taken and summed against loops in float64, forward and gradients."""

import pytest
import torch

from adamoe_dist.dispatch.rows import sum_rows, take_rows

PLACES = {
    "scattered": [3, 0, 3, 5, 1, 3],
    "one_place": [2, 2, 2, 2],
    "in_order": [0, 1, 2, 3, 4, 5],
    "none": [],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_taking_and_summing_are_loops_and_each_others_gradient(places, dtype):
    generator = torch.Generator().manual_seed(0)
    place_R = torch.tensor(places, dtype=torch.int64)
    table = torch.randn(6, 24, generator=generator).to(dtype).requires_grad_()
    rows = torch.randn(len(places), 24, generator=generator).to(dtype).requires_grad_()

    def looped(values):
        summed = torch.zeros(6, 24, dtype=torch.float64)
        for place, row in zip(places, values.double(), strict=True):
            summed[place] += row
        return summed

    taken, summed = take_rows(table, place_R), sum_rows(rows, place_R, 6)
    assert torch.equal(taken, table.detach()[place_R]) and taken.dtype == summed.dtype == dtype
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(summed.detach().double(), looped(rows.detach()), rtol=tolerance, atol=tolerance)
    assert (summed[[place for place in range(6) if place not in places]] == 0).all()
    taken.backward(rows.detach())
    torch.testing.assert_close(table.grad.double(), looped(rows.detach()), rtol=tolerance, atol=tolerance)
    summed.backward(table.detach())
    assert torch.equal(rows.grad, table.detach()[place_R])


def test_rows_that_are_summed_are_not_kept_for_backward():
    kept = []
    rows = torch.randn(5, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sum_rows(rows, torch.tensor([0, 1, 1, 0, 2]), 3)
    assert max(kept) < rows.numel()
