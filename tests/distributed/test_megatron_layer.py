"""Without null experts the layer on two ranks is Megatron's own on two ranks, bit for bit."""

import pytest
import torch

from tests.distributed.cases import merged
from tests.model.layers import PLAIN, run_both_on_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("normalize", ["true_experts", "none"])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_two_ranks_compute_megatrons_bits(ranks_of, deduplicate, normalize):
    """With k = 2 de-duplication adds the same two products, so that even then no bit differs."""
    moe = merged(PLAIN, {"router": {"normalize": normalize}, "dispatcher": {"deduplicate": deduplicate}})
    for ours, theirs in ranks_of(2).run(run_both_on_ranks, {"moe": moe}):
        assert ours.keys() == theirs.keys() and len(ours) == 3 + 2 * 4
        for name, value in theirs.items():
            assert float(value.abs().max()) > 1e-3, f"{name} shows nothing"
            assert torch.equal(ours[name], value), name
