"""The matrix of layouts, ZeRO stages and precisions: its cells, what bounds each, and the table of what came out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import Outcome, merged
from tests.distributed.harness import Ranks

RanksOf = Callable[[int], Ranks]
STEPS = 4
CLIP = 0.5

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "DP2": (2, {"expert": 1}),
    "EP2": (2, {"expert": 2}),
    "TP2": (2, {"tensor": 2, "expert": 1}),
    "TP2 EP2": (2, {"tensor": 2, "expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2, "expert": 1}),
    "CP2 EP2": (2, {"context": 2, "expert": 2}),
    "ETP2": (2, {"expert_tensor": 2, "expert": 1}),
    "TP2 ETP2": (2, {"tensor": 2, "expert_tensor": 2, "expert": 1}),
    "EP2 x DP2": (4, {"expert": 2}),
    "EP4": (4, {"expert": 4}),
    "TP2 x EP2": (4, {"tensor": 2, "expert": 2}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 x CP2": (4, {"tensor": 2, "context": 2}),
    "PP2 x EP2": (4, {"pipeline": 2, "expert": 2}),
    "PP4": (4, {"pipeline": 4}),
    "CP2 x EP2": (4, {"context": 2, "expert": 2}),
    "ETP2 x EP2": (4, {"expert_tensor": 2, "expert": 2}),
    "TP2 ETP2 x EP2": (4, {"tensor": 2, "expert_tensor": 2, "expert": 2}),
}
"""World size and degrees. ``A x B`` uses ranks of its own for each, ``A B`` shares them."""

STAGES = (0, 1, 2, 3)

COMMON: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 16},
    "moe": {
        "num_experts": 4,
        "num_null_experts": 4,
        "top_k": 3,
        "expert_hidden_size": 24,
        "shared_expert_hidden_size": 16,
        "router": {"z_loss_coefficient": 1e-3, "balance": {"coefficient": 0.02}},
    },
    "train": {"global_batch_size": 12, "micro_batch_size": 1, "gradient_clipping": CLIP},
    "optimizer": {"learning_rate": 1e-3},
}
SGD: dict[str, Any] = {"optimizer": {"type": "sgd", "learning_rate": 0.1}}


@dataclass(frozen=True)
class Cell:
    """One way to run the same training."""

    layout: str
    stage: int
    precision: str
    optimizer: str
    tied: bool = False

    @property
    def world(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def degrees(self) -> dict[str, int]:
        return LAYOUTS[self.layout][1]

    @property
    def is_refused(self) -> bool:
        """ZeRO-3 under a pipeline."""
        return self.stage == 3 and self.degrees.get("pipeline", 1) > 1

    def changes(self) -> dict[str, Any]:
        changes = merged(COMMON, {"zero": {"stage": self.stage}, "model": {"tie_embeddings": self.tied}})
        return merged(changes, SGD if self.optimizer == "sgd" else {})


@dataclass
class Deviation:
    """How far a run is from another: relative, the largest over steps or weights.

    ``weights`` is over the weight's own norm, ``ways`` over the way that it went in training.
    """

    losses: float
    norms: float
    gradients: float
    weights: float
    ways: float


def apart(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    """Distance of two tensors over the norm of a third; 0 where all are 0."""
    distance = float((ours.double() - theirs.double()).norm())
    return distance / float(scale.double().norm()) if distance else 0.0


def deviation(ours: Outcome, theirs: Outcome) -> Deviation:
    assert ours.weights.keys() == theirs.weights.keys() and ours.gradients.keys() == theirs.gradients.keys()

    def relative(left: Sequence[float], right: Sequence[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))

    def largest(names: dict[str, torch.Tensor], kind: str) -> float:
        distances = []
        for name in names:
            scale = theirs.gradients[name] if kind == "gradients" else theirs.weights[name]
            ours_is, theirs_is = getattr(ours, kind)[name], getattr(theirs, kind)[name]
            distances.append(apart(ours_is, theirs_is, scale))
        return max(distances)

    ways = [
        apart(ours.weights[name], theirs.weights[name], theirs.weights[name] - theirs.initial[name])
        for name in theirs.weights
    ]
    return Deviation(
        losses=relative(ours.losses, theirs.losses),
        norms=relative(ours.norms, theirs.norms),
        gradients=largest(theirs.gradients, "gradients"),
        weights=largest(theirs.weights, "weights"),
        ways=max(ways),
    )


def write_results(path: Path, results: dict[Cell, Deviation]) -> None:
    rows = [{**asdict(cell), **asdict(found)} for cell, found in results.items()]
    path.write_text(json.dumps(rows, indent=1) + "\n")
