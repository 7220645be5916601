"""How far implementations of AdamW are from the formula in float64, for gradients that are given."""

import pytest
import torch

from adamoe_dist.config import config_from_dict
from tests.distributed.cases import BASE, merged

ROUNDING = 2.0**-24
STEPS = 20


def reference(weight: torch.Tensor, gradients: list[torch.Tensor], settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in float64, and by how much fp32 may miss it.

    In step t a moment has gone through t roundings and the rest of the update through less than ten, each of one part
    in 2^24 of the sum of its terms' sizes; 1 - beta is as inexact as beta in fp32 makes it; the weight itself is
    rounded twice a step.
    """
    rate, decay, epsilon = settings.learning_rate, settings.weight_decay, settings.epsilon
    beta1, beta2 = settings.beta1, settings.beta2
    inexact = sum(abs(float(torch.tensor(beta)) - beta) / (1 - beta) for beta in (beta1, beta2))
    weight = weight.double()
    first, first_of_sizes, second, allowed = (torch.zeros_like(weight) for _ in range(4))
    for step, gradient in enumerate((g.double() for g in gradients), 1):
        first = beta1 * first + (1 - beta1) * gradient
        first_of_sizes = beta1 * first_of_sizes + (1 - beta1) * gradient.abs()
        second = beta2 * second + (1 - beta2) * gradient.square()
        divisor = (second / (1 - beta2**step)).sqrt() + epsilon
        scale = rate / (1 - beta1**step)
        weight = weight * (1 - rate * decay) - scale * first / divisor
        allowed += (
            scale * first_of_sizes / divisor * ((2 * step + 10) * ROUNDING + inexact) + 2 * ROUNDING * weight.abs()
        )
    return weight, allowed


@pytest.mark.parametrize("implementation", ["torch", "deepspeed_cpu"])
def test_an_implementation_is_adamw_but_for_rounding(implementation: str) -> None:
    from adamoe_dist import platform

    platform.prepare()
    from adamoe_dist.parallel import build_optimizer, cpu_adam_problem

    if implementation == "deepspeed_cpu" and cpu_adam_problem():
        pytest.skip(str(cpu_adam_problem()))
    config = config_from_dict(merged(BASE, {"optimizer": {"learning_rate": 1e-3}}))
    generator = torch.Generator().manual_seed(3)
    sizes = 10.0 ** torch.empty(5000).uniform_(-7, 0, generator=generator)
    gradients = [sizes * torch.randn(5000, generator=generator) for _ in range(STEPS)]
    weight = torch.nn.Parameter(0.02 * torch.randn(5000, generator=generator))
    expected, allowed = reference(weight.detach(), gradients, config.optimizer)
    group = {"params": [weight], "weight_decay": config.optimizer.weight_decay}
    optimizer = build_optimizer(config, [group], implementation)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    missed = (weight.detach().double() - expected).abs()
    print(f"of the bound {float((missed / allowed).max()):.2f}")
    assert bool((missed <= allowed).all())
    assert float(allowed.norm() / expected.norm()) < 1e-4, "the bound must say something"
