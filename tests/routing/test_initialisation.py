import pytest
import torch

from adamoe_dist.routing import expand_shared, initial_null_rows


def ones(tensor: torch.Tensor) -> None:
    tensor.fill_(1.0)


def refuse(tensor: torch.Tensor) -> None:
    raise AssertionError("called")


@pytest.fixture
def true_weight_EH() -> torch.Tensor:
    return 0.02 * torch.randn(8, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "rows"), [("random", 5), ("shared", 1)])
def test_random_and_shared_rows_come_from_the_init_method(true_weight_EH, kind, rows):
    weight = initial_null_rows(kind, true_weight_EH, 5, ones)
    assert torch.equal(weight, torch.ones(rows, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_copies_repeat_the_true_rows_with_a_little_noise(true_weight_EH, dtype):
    true = true_weight_EH.to(dtype)
    before = true.clone()
    rows = initial_null_rows("copy", true.requires_grad_(), 20, refuse, noise_std_ratio=1e-2)
    assert rows.dtype == dtype and not rows.requires_grad
    assert torch.equal(true, before)
    noise = rows.double() - true.detach().double()[torch.arange(20) % 8]
    if dtype != torch.bfloat16:
        assert noise.std().item() == pytest.approx(1e-2 * true.std().item(), rel=0.05)
    assert (noise.abs().amax(dim=1) > 0).all()


def test_copies_without_noise_are_exact_and_a_generator_makes_them_repeatable(true_weight_EH):
    exact = initial_null_rows("copy", true_weight_EH, 10, refuse, noise_std_ratio=0.0)
    assert torch.equal(exact, true_weight_EH[torch.arange(10) % 8])
    first, second = (
        initial_null_rows("copy", true_weight_EH, 10, refuse, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["random", "copy", "shared"])
def test_no_null_experts_no_rows(true_weight_EH, kind):
    assert initial_null_rows(kind, true_weight_EH, 0, refuse).shape == (0, 512)


def test_a_shared_logit_is_repeated_and_its_gradient_summed():
    shared = torch.tensor([[1.0], [2.0]], requires_grad=True)
    expanded = expand_shared(shared, 3)
    assert expanded.tolist() == [[1.0] * 3, [2.0] * 3]
    expanded.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert shared.grad.tolist() == [[6.0], [15.0]]
