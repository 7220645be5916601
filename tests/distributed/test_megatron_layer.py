"""Without null experts the layer on two ranks is Megatron's own on two ranks, bit for bit."""

import pytest
import torch

from tests.distributed.cases import merged
from tests.model.layers import PLAIN, run_baseline_on_ranks, run_both_on_ranks

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


def test_the_baseline_counts_its_rows_and_losses_on_two_ranks(ranks_of):
    balance = {"type": "switch", "coefficient": 0.5}
    moe = merged(PLAIN, {"router": {"type": "topk", "z_loss_coefficient": 0.25, "balance": balance}})
    results = ranks_of(2).run(run_baseline_on_ranks, moe)
    everyone = torch.stack([result["map"] for result in results])
    for rank, result in enumerate(results):
        mine, sums = result["map"], result["sums"]
        assert result["by_load"] == [0, 0, 48] and result["by_expert"] == mine.sum(dim=0).tolist()
        away = mine[:, 4:] if rank == 0 else mine[:, :4]
        assert sums["dispatch_rows"] == sums["dispatch_rows_undeduplicated"] == int(away.sum()) > 0
        assert sums["dispatch_bytes"] == int(away.sum()) * (64 * 4 + 4)
        assert result["rows"] == [int(everyone[:, :, rank * 4 : rank * 4 + 4].sum())]
        z, balance_loss = result["attached"]
        assert (sums["z_loss"], sums["balance_loss"]) == (pytest.approx(z), pytest.approx(balance_loss))
    ours = ranks_of(2).run(run_baseline_on_ranks, merged(PLAIN, {"router": {"balance": {"type": "none"}}}))
    for result, other in zip(results, ours, strict=True):
        assert torch.equal(result["output"], other["output"])
