"""Experts and grouped products against loops in float64, and the choice between kernels."""

import pytest
import torch

from adamoe_dist.errors import UserError
from adamoe_dist.experts import KERNELS, choose_kernel
from adamoe_dist.experts.kernels import grouped_mm, sequential

PRODUCTS = {"grouped_mm": grouped_mm, "sequential": sequential}

COUNTS = {
    "uneven": [5, 1, 9, 2],
    "empty_inside": [4, 0, 0, 7],
    "empty_at_the_ends": [0, 3, 6, 0],
    "only_one": [0, 0, 8, 0],
    "no_rows": [0, 0, 0, 0],
}
EXPERTS = {**COUNTS, "even": [70, 70, 70, 70], "one_is_most": [3, 300, 2, 5]}


def operands(counts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(dtype).requires_grad_()
    return rows, weight


def loop(rows, weight, counts):
    """One row at a time."""
    results, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            results.append(weight[expert] @ rows[row])
            row += 1
    return torch.stack(results) if results else rows @ weight[0].t()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("gradient", ["dense", "expanded"])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_and_gradients_are_those_of_a_loop(kernel, gradient, counts):
    rows, weight = operands(counts)
    output = PRODUCTS[kernel](rows, weight, torch.tensor(counts))
    exact_rows, exact_weight = (x.detach().double().requires_grad_() for x in (rows, weight))
    expected = loop(exact_rows, exact_weight, counts)
    assert output.shape == expected.shape == (sum(counts), 24)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    if gradient == "expanded":
        output.sum().backward()
        expected.sum().backward()
    else:
        output.backward(cotangent)
        expected.backward(cotangent.double())
    torch.testing.assert_close(output.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert rows.grad is not None and weight.grad is not None, "a missing gradient stalls ZeRO's reduction"
    torch.testing.assert_close(rows.grad.double(), exact_rows.grad, rtol=1e-5, atol=1e-5)
    wanted = exact_weight.grad if exact_weight.grad is not None else torch.zeros_like(exact_weight)
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-5)
    for expert, count in enumerate(counts):
        assert bool(weight.grad[expert].count_nonzero() == 0) == (count == 0)


def experts(counts, dtype):
    """Rows, both matrices and combine weights, some of them zero; all want gradients."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    weights[::5] = 0.0
    precise = torch.promote_types(dtype, torch.float32)
    values = (drawn(sum(counts), 16), drawn(len(counts), 48, 16), drawn(len(counts), 16, 24), weights.to(precise))
    return [value.requires_grad_() for value in values]


def row_by_row(rows, weight1, weight2, counts, weights):
    """Silu(gate) * up * weight, then down: one row at a time."""
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    results = []
    for row, expert in enumerate(owner):
        gate, up = (weight1[expert] @ rows[row]).chunk(2)
        results.append(weight2[expert] @ (gate * gate.sigmoid() * up * weights[row]))
    return torch.stack(results) if results else rows


def gradients(kernel, values, counts):
    output = kernel(*values[:3], counts, values[3])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    output.backward(cotangent.to(output.dtype))
    return [output.detach(), *(v.grad if v.grad is not None else torch.zeros_like(v) for v in values)]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("counts", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("threaded", torch.float64, 1e-12),
        ("sequential", torch.float64, 1e-12),
        ("threaded", torch.float32, 1e-4),
        ("grouped_mm", torch.float32, 1e-4),
    ],
)
def test_experts_and_gradients_are_those_of_a_loop(kernel, dtype, tolerance, counts, threads):
    values = experts(counts, dtype)
    exact = [value.detach().double().requires_grad_() for value in values]
    found = gradients(KERNELS[kernel], values, torch.tensor(counts))
    for value, wanted in zip(found, gradients(row_by_row, exact, counts), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance * 10)
    assert all(value.grad is not None for value in values), "a missing gradient stalls ZeRO's reduction"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("counts", EXPERTS.values(), ids=EXPERTS.keys())
def test_the_kernels_agree_in_bf16(counts):
    results = []
    for kernel in KERNELS.values():
        values = experts(counts, torch.bfloat16)
        results.append(gradients(kernel, values, torch.tensor(counts)))
        assert [value.dtype for value in results[-1]] == [torch.bfloat16] * 4 + [torch.float32]
    for others in results[1:]:
        for first, second in zip(results[0], others, strict=True):
            torch.testing.assert_close(
                first, second, rtol=3e-2, atol=3e-2 * float(first.abs().max() if first.numel() else 1)
            )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    counts = EXPERTS["uneven"]
    full = experts(counts, torch.float32)
    gradients(KERNELS["threaded"], full, torch.tensor(counts))
    values = [v.detach().requires_grad_(i not in frozen) for i, v in enumerate(full)]
    gradients(KERNELS["threaded"], values, torch.tensor(counts))
    for index, (value, reference) in enumerate(zip(values, full, strict=True)):
        if index in frozen:
            assert value.grad is None
        else:
            assert torch.equal(value.grad, reference.grad)


def test_an_error_on_a_core_reaches_the_caller(threads):
    rows, weight1, weight2, weights = experts([4, 4], torch.float32)
    with pytest.raises(RuntimeError, match="shape"):
        KERNELS["threaded"](rows, weight1[:, :, :8], weight2, torch.tensor([4, 4]), weights)


def test_the_threaded_kernel_is_refused_on_cuda():
    with pytest.raises(UserError, match=r"moe\.experts\.kernel=threaded .* use auto"):
        choose_kernel("threaded", torch.bfloat16, True, (64, 64))


@pytest.mark.parametrize(
    ("requested", "dtype", "cuda", "widths", "chosen", "reason"),
    [
        ("sequential", torch.bfloat16, True, (64, 64), "sequential", "as configured"),
        ("grouped_mm", torch.float32, True, (3, 5), "grouped_mm", "as configured"),
        ("grouped_mm", torch.float32, False, (64, 48), "grouped_mm", "as configured"),
        ("auto", torch.float32, False, (64, 48), "threaded", "CPU"),
        ("auto", torch.bfloat16, False, (3, 5), "threaded", "CPU"),
        ("auto", torch.bfloat16, True, (64, 48), "grouped_mm", "CUDA"),
        ("auto", torch.bfloat16, True, (64, 8), "grouped_mm", "CUDA"),
        ("auto", torch.bfloat16, True, (64, 44), "sequential", "multiples of 16 bytes"),
        ("auto", torch.bfloat16, True, (60, 64), "sequential", "multiples of 16 bytes"),
        ("auto", torch.float32, True, (64, 64), "sequential", "is for bf16"),
    ],
)
def test_the_kernel_chosen_and_why(requested, dtype, cuda, widths, chosen, reason):
    name, why = choose_kernel(requested, dtype, cuda, widths)
    assert name == chosen and reason in why
