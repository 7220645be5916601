"""Balance loss and z-loss against the plain-Python reference; padding; the schedule."""

import pytest
import torch

from adamoe_dist.routing import (
    BatchLoads,
    annealed_coefficient,
    balance_loss,
    balanced_loads,
    mean_probabilities,
    select,
    selected_counts,
    z_loss,
)
from tests.routing import reference
from tests.routing.examples import distinct_logits, some_padding

KINDS = ("null_averaged", "switch")
FUNCTIONS = ("softmax", "sigmoid")


def loss_and_gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def balance(kind, k=3, num_true=5, padding=None, function="softmax", target=None):
    def loss(logits):
        selection = select(logits, num_true, k, "true_experts", padding, score_function=function)
        return balance_loss(logits, selection, kind, padding, score_function=function, target_null_share=target)

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_null", "k"), [(0, 1), (0, 2), (1, 2), (4, 3), (9, 4), (9, 14)])
def test_balance_loss_and_gradient_equal_the_reference(kind, num_null, k):
    logits = distinct_logits(6, 5 + num_null, seed=k)
    for padding in (torch.zeros(6, dtype=torch.bool), some_padding(6, seed=1)):
        loss, gradient = loss_and_gradient(balance(kind, k, padding=padding), logits)
        pads, rows = padding.tolist(), logits.tolist()
        assert loss.item() == pytest.approx(reference.balance(rows, 5, k, kind, pads), rel=1e-12)
        loads = reference.fractions(reference.real_rows(rows, pads), k)
        expected = reference.gradient(
            lambda rows, pads=pads, loads=loads: reference.balance(rows, 5, k, kind, pads, loads), rows
        )
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "function", "target"),
    [
        ("grouped", "softmax", None),
        ("grouped", "softmax", 0.3),
        ("grouped", "softmax", 0.9),
        ("grouped", "sigmoid", 0.6),
        ("null_averaged", "sigmoid", None),
        ("switch", "sigmoid", None),
    ],
)
def test_grouped_and_sigmoid_losses_and_gradients_equal_the_reference(kind, function, target):
    for num_null, k in ((1, 2), (4, 3), (9, 4)):
        logits = distinct_logits(6, 5 + num_null, seed=k)
        for padding in (torch.zeros(6, dtype=torch.bool), some_padding(6, seed=1)):
            loss, gradient = loss_and_gradient(balance(kind, k, 5, padding, function, target), logits)
            pads, rows = padding.tolist(), logits.tolist()
            expected = reference.balance(rows, 5, k, kind, pads, None, function, target)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
            loads = reference.fractions(reference.real_rows(rows, pads), k)

            def at_loads(rows, k=k, pads=pads, loads=loads):
                return reference.balance(rows, 5, k, kind, pads, loads, function, target)

            slopes = torch.tensor(reference.gradient(at_loads, rows), dtype=torch.float64)
            torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.75])
def test_grouped_is_k_at_its_target_and_pushes_towards_it(target):
    """40 tokens x 4 slots over 3 + 4 experts; one probability stands for each group."""
    k, tokens = 4, 40

    def pull(null_share):
        fractions = torch.tensor([k * (1 - null_share) / 3] * 3 + [k * null_share / 4] * 4, dtype=torch.float64)
        logit = torch.tensor(target / (1 - target), dtype=torch.float64).log().requires_grad_()
        null = torch.sigmoid(logit)
        chances = torch.cat(((1 - null).expand(3) / 3, null.expand(4) / 4))
        loss = 7 * (balanced_loads(fractions, 3, "grouped", target) * chances).sum()
        loss.backward()
        return loss.item(), logit.grad.item()

    assert tokens * k * target == int(tokens * k * target)
    value, slope = pull(target)
    assert value == pytest.approx(k, rel=1e-12) and slope == pytest.approx(0, abs=1e-12)
    assert pull(target + 0.1)[1] > 1e-3 and pull(target - 0.1)[1] < -1e-3


def test_grouped_balances_nothing_inside_a_group():
    logits = distinct_logits(16, 12, seed=7)
    loss = balance("grouped", 4, 8)(logits)
    swapped = logits[:, [3, 1, 7, 0, 4, 5, 6, 2, 11, 9, 10, 8]]
    torch.testing.assert_close(balance("grouped", 4, 8)(swapped), loss)
    assert (balance("switch", 4, 8)(logits) - loss).abs() > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "grouped"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_loads_of_many_ranks_give_the_loss_of_all_their_tokens(kind, function):
    """Three ranks with unevenly padded tokens: the mean of their losses, and of its gradient, is that of one rank."""
    logits = distinct_logits(18, 9, seed=3)
    padding = some_padding(18, seed=4)
    padding[12:17] = True
    leaf = logits.clone().requires_grad_()
    balance(kind, padding=padding, function=function)(leaf).backward()
    whole = select(logits, 5, 3, "true_experts", padding, score_function=function)
    counts, tokens = selected_counts(whole, padding)
    total = torch.zeros((), dtype=torch.float64)
    split = logits.clone().requires_grad_()
    for part in torch.arange(18).split(6):
        selection = select(split[part], 5, 3, "true_experts", padding[part], score_function=function)
        batch = BatchLoads(counts, tokens, tokens, ranks=3)
        total = total + balance_loss(split[part], selection, kind, padding[part], score_function=function, batch=batch)
    (total / 3).backward()
    torch.testing.assert_close(total / 3, balance(kind, padding=padding, function=function)(logits))
    torch.testing.assert_close(split.grad, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_balance_gradcheck(kind):
    logits = distinct_logits(5, 9, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(balance(kind), logits)


def test_balance_losses_are_equal_without_null_experts():
    logits = distinct_logits(32, 8, seed=0)
    assert torch.equal(balance("switch", 2, 8)(logits), balance("null_averaged", 2, 8)(logits))


def test_z_loss_and_gradient_equal_the_reference():
    logits = distinct_logits(6, 9, seed=2)
    for padding in (None, some_padding(6, seed=1)):
        pads = [False] * 6 if padding is None else padding.tolist()
        loss, gradient = loss_and_gradient(lambda x, p=padding: z_loss(x, p), logits)
        assert loss.item() == pytest.approx(reference.z_loss(logits.tolist(), pads), rel=1e-12)
        expected = reference.gradient(lambda rows, p=pads: reference.z_loss(rows, p), logits.tolist())
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def losses_with(padding):
    return {
        "null_averaged": balance("null_averaged", padding=padding),
        "switch": balance("switch", padding=padding),
        "grouped": balance("grouped", padding=padding, target=0.4),
        "sigmoid": balance("null_averaged", padding=padding, function="sigmoid"),
        "z": lambda logits: z_loss(logits, padding),
    }


@pytest.mark.parametrize("name", ["null_averaged", "switch", "grouped", "sigmoid", "z"])
@pytest.mark.parametrize("filler", [0.0, 50.0, float("nan")])
def test_padding_never_counts(name, filler):
    logits = distinct_logits(12, 9, seed=6)
    padding = some_padding(12, seed=2)
    assert padding.any() and not padding.all()
    logits[padding] = filler
    loss, gradient = loss_and_gradient(losses_with(padding)[name], logits)
    alone, gradient_alone = loss_and_gradient(losses_with(None)[name], logits[~padding])
    torch.testing.assert_close(loss, alone, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[~padding], gradient_alone, rtol=1e-12, atol=1e-16)
    assert gradient[padding].eq(0).all()


@pytest.mark.parametrize("name", ["null_averaged", "switch", "grouped", "sigmoid", "z"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_a_batch_without_real_tokens_gives_exactly_zero(name, tokens):
    padding = torch.ones(tokens, dtype=torch.bool)
    loss, gradient = loss_and_gradient(losses_with(padding)[name], torch.randn(tokens, 9))
    assert loss.dim() == 0 and loss.item() == 0.0
    assert gradient.eq(0).all()


def test_a_mask_given_to_the_loss_alone_counts_too():
    logits, padding = distinct_logits(12, 9, seed=6), some_padding(12, seed=2)
    unmasked = select(logits, 5, 3, "true_experts")
    torch.testing.assert_close(
        balance_loss(logits, unmasked, "switch", padding), balance("switch", padding=padding)(logits)
    )


def test_null_experts_are_not_balanced_against_each_other():
    fractions = torch.tensor([0.9, 0.3, 0.5, 0.7, 0.2, 0.4], dtype=torch.float64)
    averaged = balanced_loads(fractions, 2, "null_averaged")
    permuted = balanced_loads(fractions[[0, 1, 5, 3, 2, 4]], 2, "null_averaged")
    torch.testing.assert_close(averaged, permuted)
    assert averaged.tolist() == pytest.approx([0.9, 0.3, 0.45, 0.45, 0.45, 0.45])
    assert torch.equal(balanced_loads(fractions, 2, "switch"), fractions)


def test_moving_mass_between_null_logits_has_no_gradient_under_eq_6():
    """Where each token's null probabilities are equal, so are the gradients of its null logits."""
    logits = distinct_logits(16, 12, seed=7)
    logits[:, 8:] = logits[:, 8:9]
    _, gradient = loss_and_gradient(balance("null_averaged", 4, 8), logits)
    torch.testing.assert_close(gradient[:, 8:], gradient[:, 8:9].expand(-1, 4), rtol=1e-12, atol=0)
    _, gradient = loss_and_gradient(balance("switch", 4, 8), logits)
    assert (gradient[:, 8:] - gradient[:, 8:9]).abs().max() > 1e-3


def test_low_precision_logits_are_lifted_to_fp32():
    logits = torch.randn(16, 9).bfloat16()
    selection = select(logits.float(), 5, 3, "true_experts")
    assert balance_loss(logits, selection, "switch").dtype == torch.float32
    assert z_loss(logits).dtype == torch.float32
    assert mean_probabilities(logits).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_coefficient_moves_on_a_line_and_stays():
    values = [annealed_coefficient(step, 0.02, 0.0001, 100) for step in (0, 25, 50, 100, 1000)]
    assert values == pytest.approx([0.02, 0.015025, 0.01005, 0.0001, 0.0001], rel=1e-12)
    assert annealed_coefficient(100, 0.02, 0.0001, 100) == 0.0001


def test_the_coefficient_is_constant_without_annealing():
    assert annealed_coefficient(70, 0.02, None, 100) == 0.02
    assert annealed_coefficient(70, 0.02, 0.0001, 0) == 0.02
