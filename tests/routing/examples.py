import torch
from torch import Tensor


def distinct_logits(tokens: int, experts: int, seed: int) -> Tensor:
    """Float64 logits of which no two of one token are nearer than 0.05."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1).double()
    jitter = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    return (order - experts / 2) * 0.15 + 0.1 * jitter


def some_padding(tokens: int, seed: int) -> Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.3
