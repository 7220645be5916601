"""Megatron's flex dispatcher with null experts, at the interface of DeepEP: the library and its hardware stand in."""

import os
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.dense import HIDDEN, INNER, Example, batch_of, dense, weights_of

pytestmark = pytest.mark.distributed

EXAMPLES = {
    "some null": Example(2, 4, 8, 3, 9, 11, 1000, 0, 1, "flex"),
    "one rank all null": Example(2, 4, 8, 3, 9, 12, 1000, 1, 0, "flex"),
    "all null": Example(2, 4, 8, 3, 9, 13, 1000, 3, 0, "flex"),
    "k beyond the true experts": Example(2, 1, 8, 4, 9, 14, 1000, 0, 0, "flex"),
}


class StandIn:
    """fused_dispatch and fused_combine in plain torch: everyone's tokens are gathered, sums are reduced."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.rows: list[int] = []
        self.types: set[torch.dtype] = set()

    def dispatch(self, x: Any, ids: Any, weights: Any, experts: int, group: Any, **_: Any) -> Any:
        assert weights.dtype == torch.float32 and ids.dtype == torch.int64
        self.ids.append(ids.clone()), self.types.add(x.dtype)
        all_x, all_weights, all_ids = gathered(x, group), gathered(weights, group), gathered(ids, group)
        local = experts // group.size()
        mine = all_ids - group.rank() * local
        mine = mine.masked_fill((all_ids < 0) | (mine < 0) | (mine >= local), -1)
        sources = (mine >= 0).any(dim=1).nonzero().squeeze(1)
        mine = mine[sources]
        self.rows.append(len(sources))
        counts = torch.bincount(mine[mine >= 0], minlength=local)
        arrived_weights = all_weights[sources].masked_fill(mine < 0, 0.0)
        return all_x[sources], mine, arrived_weights, counts, (sources, len(all_x))

    def combine(self, x: Any, group: Any, handle: Any, **_: Any) -> Any:
        sources, size = handle
        return summed(torch.zeros(size, x.shape[1], dtype=x.dtype).index_add(0, sources, x), group), None

    def hybrid_dispatch(
        self, x: Any, routing_map: Any, probs: Any, group: Any, num_local_experts: int, **_: Any
    ) -> Any:
        self.types.add(x.dtype)
        first = group.rank() * num_local_experts
        mine = gathered(routing_map.to(torch.uint8), group).bool()[:, first : first + num_local_experts]
        experts, sources = mine.t().nonzero().unbind(1)
        weights = gathered(probs, group)[sources, first + experts]
        self.rows.append(int(mine.any(dim=1).sum()))
        handle = (sources, mine.shape[0], group)
        return gathered(x, group)[sources], weights, None, mine.sum(dim=0), handle

    def hybrid_combine(self, x: Any, handle: Any, **_: Any) -> Any:
        sources, size, group = handle
        return summed(torch.zeros(size, x.shape[1], dtype=x.dtype).index_add(0, sources, x), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Any, group: Any) -> Any:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        whole = gradient.contiguous().clone()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Any, group: Any) -> Any:
        ctx.group = group
        whole = whole.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.chunk(group.size())[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _Gather.apply(gradient, ctx.group), None


gathered, summed = _Gather.apply, _Sum.apply


def compute(example: Example, backend: str, row_type: str) -> dict[str, Any]:
    from types import SimpleNamespace

    from megatron.core.transformer.moe import token_dispatcher as megatrons
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from adamoe_dist.dispatch import DispatcherSlot, FlexDispatcher
    from adamoe_dist.experts import GroupedExperts
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from adamoe_dist.routing import select
    from tests.model.layers import config_of

    rank, local = int(os.environ["RANK"]), example.experts_per_rank
    changes = {"moe": {"num_experts": example.experts}, "parallel": {"expert": example.ranks}}
    nodes = initialize_groups(Launch.from_environment(), config_of(changes, example.ranks)[1])
    stand_in, zeros = StandIn(), torch.zeros
    patches = {
        "fused_dispatch": stand_in.dispatch,
        "fused_combine": stand_in.combine,
        "set_deepep_num_sms": lambda _: None,
        "hybrid_ep_dispatch": stand_in.hybrid_dispatch,
        "hybrid_ep_combine": stand_in.hybrid_combine,
    }
    try:
        groups = get_default_pg_collection()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            num_moe_experts=example.experts,
            moe_router_topk=min(example.top_k, example.experts),
            moe_router_dtype="fp32",
            expert_model_parallel_size=example.ranks,
            moe_flex_dispatcher_backend=backend,
        )
        with mock.patch.multiple(megatrons, **patches):
            slot = DispatcherSlot(local, config, groups, nodes, torch.bfloat16 if row_type == "bf16" else None)
            with mock.patch.object(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k)):
                dispatcher = FlexDispatcher(slot)
            widths = SimpleNamespace(
                experts_kernel="sequential",
                hidden_size=HIDDEN,
                moe_ffn_hidden_size=INNER,
                params_dtype=torch.float32,
                recompute_granularity=None,
            )
            experts = GroupedExperts(local, widths, groups)
            with torch.no_grad():
                for mine, everyone in zip((experts.weight1, experts.weight2), weights_of(example), strict=True):
                    mine.copy_(everyone[rank * local : (rank + 1) * local])
            batch = batch_of(example, rank)
            selection = select(batch.logits.float(), example.experts, example.top_k, "true_experts")
            hidden = batch.hidden.float().requires_grad_()
            probs = selection.probs_TE.detach().requires_grad_()
            sent = dispatcher.dispatch_preprocess(hidden.unsqueeze(1), selection.routing_map_TE, probs)
            rows, counts, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
            computed, _ = experts(rows, counts, weights)
            returned = dispatcher.token_combine(dispatcher.combine_preprocess(computed))
            output = dispatcher.combine_postprocess(returned).squeeze(1)
            output.backward(batch.cotangent.float())
        return {
            "ids": stand_in.ids,
            "rows": stand_in.rows,
            "types": stand_in.types,
            "pairs": rows.shape[0],
            "map": selection.routing_map_TE.clone(),
            "weights": probs.detach().double(),
            "sent": int(dispatcher.last_count.rows),
            "kept": int(dispatcher.last_count.rows_same_rank),
            "values": {
                "output": output.detach(),
                "hidden": hidden.grad,
                "probs": probs.grad,
                "first": experts.weight1.grad,
                "second": experts.weight2.grad,
            },
        }
    finally:
        destroy_groups()


@pytest.mark.parametrize("case", EXAMPLES)
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_null_slots_are_sent_nowhere_and_the_rest_is_the_dense_loop(ranks_of, backend, case):
    example = EXAMPLES[case]
    results = ranks_of(2).run(compute, example, backend, "model")
    wanted = dense(example, [result["map"] for result in results], [result["weights"] for result in results])
    needed = [[0, 0], [0, 0]]
    for rank, result in enumerate(results):
        for token, row in enumerate(result["map"].tolist()):
            for other in range(2):
                local = example.experts_per_rank
                needed[rank][other] += any(row[other * local : (other + 1) * local])
            if backend == "deepep":
                ids = result["ids"][0][token].tolist()
                chosen = [expert for expert, used in enumerate(row) if used]
                assert sorted(i for i in ids if i >= 0) == chosen
                assert ids.count(-1) == min(example.top_k, example.experts) - len(chosen)
        for name, value in result["values"].items():
            torch.testing.assert_close(value.double(), wanted[name][rank], rtol=2e-5, atol=2e-5, msg=name)
        assert result["types"] == {torch.float32}
    for rank, result in enumerate(results):
        assert result["rows"] == [needed[0][rank] + needed[1][rank]]
        assert result["pairs"] == sum(
            int(other["map"][:, rank * local : (rank + 1) * local].sum()) for other in results
        )
        assert (result["kept"], result["sent"]) == (needed[rank][rank], needed[rank][1 - rank])
    if case == "all null":
        assert all(result["rows"] == [0] and result["pairs"] == 0 for result in results)


def test_rows_travel_in_bf16_if_asked(ranks_of):
    for result in ranks_of(2).run(compute, EXAMPLES["some null"], "deepep", "bf16"):
        assert result["types"] == {torch.bfloat16} and result["values"]["output"].dtype == torch.float32


def test_without_the_library_it_is_refused(monkeypatch):
    import sys
    from types import SimpleNamespace

    from adamoe_dist.dispatch import check_flex
    from adamoe_dist.errors import UserError

    with pytest.raises(UserError, match=r"moe.dispatcher.type=flex .*deep_ep \(DeepEP\) is not installed"):
        check_flex("deepep")
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=None))
    with pytest.raises(UserError, match="needs CUDA"):
        check_flex("deepep")
    with pytest.raises(UserError, match="has no HybridEPBuffer"):
        check_flex("hybridep")
