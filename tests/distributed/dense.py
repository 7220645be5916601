"""The layer's routed part done the slow way, in float64, without a dispatcher: the reference of the property tests."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

HIDDEN, INNER = 5, 4


@dataclass(frozen=True)
class Example:
    """One batch on each rank, and how it is dispatched."""

    ranks: int
    experts_per_rank: int
    null_experts: int
    top_k: int
    tokens: int
    seed: int
    grid: int
    """Scores are multiples of 1 / grid: a coarse grid makes ties."""
    all_null: int
    """Bit r: the tokens of rank r choose null experts only, as far as there are enough of them."""
    unused: int
    """So many experts that no token wants."""
    dispatcher: str
    expert_tensor: int = 1
    """So many ranks next to each other share each expert's matrices."""

    @property
    def experts(self) -> int:
        return self.ranks // self.expert_tensor * self.experts_per_rank

    def held(self, first: torch.Tensor, second: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all experts' (E, 2F, H) and (E, H, F), or their gradients, what one rank holds."""
        place, part = divmod(rank, self.expert_tensor)
        mine = range(place * self.experts_per_rank, (place + 1) * self.experts_per_rank)
        width = INNER // self.expert_tensor
        inner = list(range(part * width, (part + 1) * width))
        gate_and_up = inner + [INNER + index for index in inner]
        return first[mine][:, gate_and_up], second[mine][:, :, inner]


@dataclass
class Batch:
    logits: torch.Tensor
    hidden: torch.Tensor
    cotangent: torch.Tensor


def batch_of(example: Example, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(example.seed * 7 + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = (normal(example.tokens, example.experts + example.null_experts) * example.grid).round() / example.grid
    logits[:, : min(example.unused, example.experts)] -= 50.0
    if example.all_null >> rank & 1:
        logits[:, example.experts :] += 100.0
    return Batch(logits, normal(example.tokens, HIDDEN), normal(example.tokens, HIDDEN))


def weights_of(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(example.seed + 1)
    shapes = ((example.experts, 2 * INNER, HIDDEN), (example.experts, HIDDEN, INNER))
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return first, second


def dense(example: Example, maps: list[torch.Tensor], probs: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Every expert on every token, weighted by the given probabilities where the given maps are true.

    Returns outputs and gradients: of each rank's hidden vectors and probabilities, and of all experts' weights.
    """
    first, second = (weight.requires_grad_() for weight in weights_of(example))
    outputs, hidden, weights, loss = [], [], [], torch.zeros((), dtype=torch.float64)
    for rank in range(example.ranks):
        batch = batch_of(example, rank)
        tokens, chances = batch.hidden.requires_grad_(), probs[rank].clone().requires_grad_()
        output = torch.zeros_like(tokens)
        for expert in range(example.experts):
            gate, up = tokens @ first[expert][:INNER].t(), tokens @ first[expert][INNER:].t()
            computed = (F.silu(gate) * up) @ second[expert].t()
            output = output + computed * (chances[:, expert] * maps[rank][:, expert]).unsqueeze(1)
        loss = loss + (output * batch.cotangent).sum()
        outputs.append(output.detach()), hidden.append(tokens), weights.append(chances)
    loss.backward()
    held = [example.held(first.grad, second.grad, rank) for rank in range(example.ranks)]
    return {
        "output": outputs,
        "hidden": [tensor.grad for tensor in hidden],
        "probs": [tensor.grad for tensor in weights],
        "first": [mine for mine, _ in held],
        "second": [mine for _, mine in held],
    }
