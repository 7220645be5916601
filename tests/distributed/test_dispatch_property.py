"""Routing, dispatch, experts and combine on 1, 2 and 4 ranks against the dense float64 loop, whatever the routing.

The experts are spread over the ranks, or their matrices are cut, or both.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.dense import HIDDEN, INNER, Example, batch_of, dense, weights_of
from tests.distributed.harness import Ranks
from tests.distributed.layouts import Layout, close_groups, open_groups

pytestmark = pytest.mark.distributed

DISPATCHERS = {
    "deduplicated": {},
    "row a pair": {"deduplicate": False},
    "allgather": {"type": "allgather"},
    "padded": {"pad_to_capacity": True},
}
CUTTING = ["deduplicated", "row a pair"]
EXAMPLES = {
    Layout(): 30,
    Layout(expert=2): 100,
    Layout(expert=4): 30,
    Layout(expert_tensor=2): 40,
    Layout(expert_tensor=4): 15,
    Layout(expert=2, expert_tensor=2): 30,
}
QUICK = 3
"""`make test` draws one in so many of the examples."""


def compute(example: Example) -> dict[str, torch.Tensor]:
    """The rank's part of one example: forward, backward, and what the router said."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from adamoe_dist.config import config_from_dict
    from adamoe_dist.dispatch import make_dispatcher
    from adamoe_dist.experts import GroupedExperts
    from adamoe_dist.routing import select

    groups = get_default_pg_collection()
    rank, local = torch.distributed.get_rank(), example.experts_per_rank
    assert rank == groups.ep.rank() * example.expert_tensor + groups.expt_tp.rank()
    keys = config_from_dict({"moe": {"dispatcher": DISPATCHERS[example.dispatcher]}}).moe.dispatcher
    megatron = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    dispatcher = make_dispatcher(keys, local, megatron, groups, capacity=lambda tokens: tokens + 1)
    widths = SimpleNamespace(
        experts_kernel="sequential",
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=INNER,
        params_dtype=torch.float64,
        recompute_granularity=None,
    )
    experts = GroupedExperts(local, widths, groups)
    with torch.no_grad():
        for mine, held in zip(
            (experts.weight1, experts.weight2), example.held(*weights_of(example), rank), strict=True
        ):
            mine.copy_(held)
    batch = batch_of(example, rank)
    selection = select(batch.logits, example.experts, example.top_k, "true_experts")
    hidden, probs = batch.hidden.requires_grad_(), selection.probs_TE.detach().requires_grad_()
    rows, weights = dispatcher.dispatch_preprocess(hidden, selection.routing_map_TE, probs)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    computed, _ = experts(*dispatcher.dispatch_postprocess(rows, weights))
    returned = dispatcher.token_combine(dispatcher.combine_preprocess(computed))
    output = dispatcher.combine_postprocess(returned)
    output.backward(batch.cotangent)
    return {
        "map": selection.routing_map_TE.clone(),
        "weights": probs.detach().clone(),
        "output": output.detach(),
        "hidden": hidden.grad,
        "probs": probs.grad,
        "first": experts.weight1.grad,
        "second": experts.weight2.grad,
    }


class Opened:
    """Ranks with groups; opened again where a failed example killed them."""

    def __init__(self, ranks_of: Callable[[int], Ranks], layout: Layout) -> None:
        self.ranks_of, self.layout = ranks_of, layout
        self.ranks: Ranks | None = None

    def run(self, example: Example) -> list[Any]:
        ranks = self.ranks_of(self.layout.ranks)
        if ranks is not self.ranks:
            ranks.run(open_groups, self.layout)
            self.ranks = ranks
        return ranks.run(compute, example, timeout_s=60)

    def close(self) -> None:
        if self.ranks is self.ranks_of(self.layout.ranks):
            self.ranks.run(close_groups)


@st.composite
def examples(draw: Any, layout: Layout) -> Example:
    local, null = draw(st.integers(1, 9 if layout.expert == 1 else 4)), draw(st.integers(0, 9))
    kinds = sorted(DISPATCHERS) if layout.expert_tensor == 1 else CUTTING
    return Example(
        ranks=layout.ranks,
        experts_per_rank=local,
        null_experts=null,
        top_k=draw(st.integers(1, min(layout.expert * local + null, 6))),
        tokens=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**16)),
        grid=draw(st.sampled_from([1, 2, 1000])),
        all_null=draw(st.integers(0, 2**layout.ranks - 1)) if draw(st.booleans()) else 0,
        unused=draw(st.integers(0, 3)),
        dispatcher=draw(st.sampled_from(kinds)),
        expert_tensor=layout.expert_tensor,
    )


@pytest.mark.parametrize("layout", EXAMPLES, ids=str)
@pytest.mark.parametrize("part", [QUICK, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_any_routing_gives_the_dense_loops_values_and_gradients(ranks_of, layout, part):
    opened = Opened(ranks_of, layout)

    @settings(max_examples=EXAMPLES[layout] // part, deadline=None, suppress_health_check=list(HealthCheck))
    @given(examples(layout))
    def check(example: Example) -> None:
        results = opened.run(example)
        wanted = dense(example, [result["map"] for result in results], [result["weights"] for result in results])
        for rank, result in enumerate(results):
            assert int(result["map"].sum(dim=1).max() if example.tokens else 0) <= example.top_k
            for name, values in wanted.items():
                torch.testing.assert_close(result[name], values[rank], rtol=1e-11, atol=1e-12)
            idle = ~result["map"].any(dim=1)
            assert result["output"][idle].count_nonzero() == 0 and result["hidden"][idle].count_nonzero() == 0
            assert result["probs"][~result["map"]].count_nonzero() == 0

    try:
        check()
    finally:
        opened.close()
