"""Grouped products against a loop in float64, and the choice between them."""

import pytest
import torch

from adamoe_dist.experts import KERNELS, choose_kernel

COUNTS = {
    "uneven": [5, 1, 9, 2],
    "empty_inside": [4, 0, 0, 7],
    "empty_at_the_ends": [0, 3, 6, 0],
    "only_one": [0, 0, 8, 0],
    "no_rows": [0, 0, 0, 0],
}


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
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_and_gradients_are_those_of_a_loop(kernel, gradient, counts):
    rows, weight = operands(counts)
    output = KERNELS[kernel](rows, weight, torch.tensor(counts))
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


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_kernels_agree_in_bf16(counts):
    results = []
    for kernel in KERNELS.values():
        rows, weight = operands(counts, torch.bfloat16)
        output = kernel(rows, weight, torch.tensor(counts))
        output.sum().backward()
        assert output.dtype == rows.grad.dtype == weight.grad.dtype == torch.bfloat16
        results.append((output.detach(), rows.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("requested", "dtype", "cuda", "widths", "chosen", "reason"),
    [
        ("sequential", torch.bfloat16, True, (64, 64), "sequential", "as configured"),
        ("grouped_mm", torch.float32, True, (3, 5), "grouped_mm", "as configured"),
        ("auto", torch.float32, False, (64, 48), "grouped_mm", "CPU"),
        ("auto", torch.bfloat16, False, (3, 5), "grouped_mm", "CPU"),
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
