"""What AdaMoE's released code does, kept as regression facts with their figures.

The fixed example is n = 8, m = 16, k = 4, 64 tokens of `torch.randn` after `manual_seed(0)`.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from adamoe_dist.routing import balance_loss, initial_null_rows, select
from tests.routing.examples import distinct_logits

NUM_TRUE, NUM_NULL, TOP_K = 8, 16, 4


@pytest.fixture
def logits_TA() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, NUM_TRUE + NUM_NULL)


def paper_loss(logits_TA: Tensor, kind: str) -> float:
    return balance_loss(logits_TA, select(logits_TA, NUM_TRUE, TOP_K, "true_experts"), kind).item()


def released_mixtral_loss(logits_TA: Tensor) -> float:
    """exp_2's loss: the load table is (slot, expert), and its first axis is the one that is sliced."""
    experts = logits_TA.shape[1]
    chosen_TK = logits_TA.softmax(dim=-1).topk(TOP_K, dim=-1).indices
    load_KA = one_hot(chosen_TK, experts).float().mean(dim=0)
    first_null = experts - NUM_NULL
    load_KA[first_null:] = load_KA[first_null:].mean(dim=0, keepdim=True)
    return (experts * (load_KA * logits_TA.softmax(dim=-1).mean(dim=0)).sum()).item()


def released_lora_loss(logits_TA: Tensor) -> float:
    """exp_1's loss: null loads are averaged, but the loads are shares of all slots and sum to 1."""
    experts = logits_TA.shape[1]
    chosen_TK = logits_TA.softmax(dim=-1).topk(TOP_K, dim=-1).indices
    counts_A = torch.bincount(chosen_TK.flatten(), minlength=experts).float()
    share_A = counts_A / counts_A.sum()
    share_A[NUM_TRUE:] = share_A[NUM_TRUE:].mean()
    return (experts * (share_A * logits_TA.softmax(dim=-1).mean(dim=0)).sum()).item()


def test_line_1_the_released_null_averaging_does_nothing(logits_TA):
    released = released_mixtral_loss(logits_TA)
    assert released == pytest.approx(4.2029, abs=5e-5)
    assert paper_loss(logits_TA, "switch") == pytest.approx(released, rel=1e-6)
    assert paper_loss(logits_TA, "null_averaged") == pytest.approx(4.0529, abs=5e-5)


@pytest.mark.parametrize("kind", ["null_averaged", "switch"])
@pytest.mark.parametrize("top_k", [1, 3, 8, 24])
def test_line_5_the_value_at_balance_is_k(kind, top_k):
    """Every rotation of one row once: each expert has load k / (n + m) and probability 1 / (n + m)."""
    row_A = distinct_logits(1, 24, seed=0)[0]
    logits = torch.stack([row_A.roll(shift) for shift in range(24)])
    selection = select(logits, NUM_TRUE, top_k, "true_experts")
    assert balance_loss(logits, selection, kind).item() == pytest.approx(top_k, rel=1e-12)


def test_line_8_the_task_loss_does_not_reach_null_logits(logits_TA):
    """Nor the true logits of a token with one true expert, whose weight is the constant 1."""
    leaf = logits_TA.double().requires_grad_()
    selection = select(leaf, NUM_TRUE, TOP_K, "true_experts")
    cotangent_TE = torch.randn(64, NUM_TRUE, dtype=torch.float64)
    (selection.probs_TE * cotangent_TE).sum().backward()
    load_T = selection.routing_map_TE.sum(dim=1)
    assert set(load_T.tolist()) >= {0, 1, 2}
    assert leaf.grad[:, NUM_TRUE:].abs().max() < 1e-15
    assert leaf.grad[load_T < 2].abs().max() < 1e-15
    selected_gradient = leaf.grad[load_T >= 2, :NUM_TRUE][selection.routing_map_TE[load_T >= 2]]
    assert selected_gradient.abs().min() > 1e-5


@pytest.mark.parametrize("mode", ["all_selected", "none"])
def test_line_8_holds_for_true_only_normalisation_alone(logits_TA, mode):
    leaf = logits_TA.double().requires_grad_()
    selection = select(leaf, NUM_TRUE, TOP_K, mode)
    selection.probs_TE.sum().backward()
    mixed_T = selection.routing_map_TE.any(dim=1) & selection.null_map_TN.any(dim=1)
    assert leaf.grad[:, NUM_TRUE:][mixed_T].abs().amax(dim=1).min() > 1e-5


def true_per_token(logits_TA: Tensor, top_k: int) -> Tensor:
    return select(logits_TA, NUM_TRUE, top_k, "none").routing_map_TE.sum(dim=1)


COPIES = [(8, 3, 1.485), (16, 4, 1.266), (24, 5, 1.108), (32, 6, 1.063)]


@pytest.mark.parametrize(("num_null", "top_k", "tied"), COPIES)
def test_line_15_exact_copies_tie(num_null, top_k, tied):
    """Top-k's tie-break decides: 1 or 2 true experts a token, fewer on average than independent rows have.

    The figures are those of torch's CPU kernel. With 20 000 tokens their standard error is below 0.004; the
    tolerance is 0.01.
    """
    torch.manual_seed(0)
    true_TE = torch.randn(20_000, NUM_TRUE)
    logits_TA = true_TE.repeat(1, 1 + num_null // NUM_TRUE)
    load_T = (logits_TA.topk(top_k, dim=1).indices < NUM_TRUE).sum(dim=1)
    assert load_T.mean(dtype=torch.float64).item() == pytest.approx(tied, abs=0.01)
    assert load_T.mean(dtype=torch.float64).item() < top_k * NUM_TRUE / (NUM_TRUE + num_null)
    assert set(load_T.tolist()) == {1, 2}


@pytest.mark.parametrize(("num_null", "top_k", "tied"), COPIES)
def test_line_15_our_copies_have_the_load_of_independent_rows(num_null, top_k, tied):
    """k n / (n + m): 1.5, 1.333, 1.25, 1.2, within 0.015 (standard error 0.004 and the noise's draw)."""
    generator = torch.Generator().manual_seed(0)
    true_EH = 0.02 * torch.randn(NUM_TRUE, 1024, generator=generator)
    null_NH = initial_null_rows("copy", true_EH, num_null, lambda tensor: None, generator=generator)
    x_TH = torch.randn(20_000, 1024, generator=generator)
    load_T = true_per_token(x_TH @ torch.cat((true_EH, null_NH)).t(), top_k)
    independent = top_k * NUM_TRUE / (NUM_TRUE + num_null)
    assert load_T.mean(dtype=torch.float64).item() == pytest.approx(independent, abs=0.015)
    assert tied < independent - 0.01


def test_line_17_the_lora_code_divides_eq_6_by_k(logits_TA):
    released = released_lora_loss(logits_TA)
    assert released == pytest.approx(1.01322, abs=5e-6)
    assert paper_loss(logits_TA, "null_averaged") / TOP_K == pytest.approx(released, rel=1e-6)
