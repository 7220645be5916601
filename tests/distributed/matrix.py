"""The matrix of layouts, ZeRO stages and precisions: its cells, what bounds each, and the table of what came out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import Outcome, merged, train
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

    @property
    def world(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def degrees(self) -> dict[str, int]:
        return LAYOUTS[self.layout][1]

    @property
    def name(self) -> str:
        """For messages and test identifiers."""
        return f"{self.layout}, stage {self.stage}, {self.precision}, {self.optimizer}"

    @property
    def refusal(self) -> str | None:
        """What a run that cannot work is refused with."""
        if self.stage == 3 and "pipeline" in self.degrees:
            return "zero.stage=3 gathers weights in an order that the stages of parallel.pipeline="
        return None

    @property
    def is_quick(self) -> bool:
        """Whether ``make test`` runs the cell; all are run by ``make test-full``.

        Every layout under stage 2; the other stages, and AdamW in bf16, with three degrees alone, and with pipelines.
        """
        is_basic = self.layout in ("DP2", "EP2", "TP2")
        if self.precision == "fp32" and self.optimizer == "sgd":
            return self.stage == 2 or (is_basic and self.stage in (0, 3))
        return (is_basic or self.layout == "PP2") and self.stage == 1 and self.precision == "bf16"

    @property
    def is_tied(self) -> bool:
        """Half of the layouts have a tied embedding, those with a pipeline among them."""
        return "PP" in self.layout or "DP" in self.layout

    def changes(self) -> dict[str, Any]:
        changes = merged(COMMON, {"zero": {"stage": self.stage}, "model": {"tie_embeddings": self.is_tied}})
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


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def deviation(ours: Outcome, theirs: Outcome) -> Deviation:
    assert ours.weights.keys() == theirs.weights.keys() and ours.gradients.keys() == theirs.gradients.keys()

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
        losses=worst(ours.losses, theirs.losses),
        norms=worst(ours.norms, theirs.norms),
        gradients=largest(theirs.gradients, "gradients"),
        weights=largest(theirs.weights, "weights"),
        ways=max(ways),
    )


def within(found: Deviation, band: Deviation) -> list[str]:
    """The measures that leave their band, in words."""
    limits = asdict(band)
    return [f"{name} {value:.1e} > {limits[name]:.1e}" for name, value in asdict(found).items() if value > limits[name]]


NOISE = 5e-7


class References:
    """Single-process runs and the bands that they give, each made once.

    fp32: losses, norms and the first step's gradients to 1e-5, and after SGD all weights. AdamW divides by the root of
    the squared gradient, so that an element of a gradient that is rounding error moves its weight like any other:
    weights may be twice as far apart as those of one process are when noise of 5e-7 of its norm, by which layouts'
    gradients differ, is added to each gradient.

    bf16: a layout rounds at other places than one process does, and routes near ties to other experts; it need not be
    more exact than one process. Two such runs may be twice as far apart as one process in bf16 is from one in fp32; the
    band is three times that.
    """

    def __init__(self, ranks_of: RanksOf) -> None:
        self._ranks_of = ranks_of
        self._runs: dict[tuple[str, str, bool, float], Outcome] = {}

    def run(self, cell: Cell, precision: str | None = None, noise: float = 0.0) -> Outcome:
        key = (precision or cell.precision, cell.optimizer, cell.is_tied, noise)
        if key not in self._runs:
            changes = merged(cell.changes(), {"zero": {"stage": 1}})
            self._runs[key] = self._ranks_of(1).run(train, changes, STEPS, 1, key[0], None, False, noise)[0]
        return self._runs[key]

    def band(self, cell: Cell) -> Deviation:
        single = self.run(cell)
        if cell.precision == "bf16":
            rounding = asdict(deviation(single, self.run(cell, "fp32")))
            return Deviation(**{name: 3 * value for name, value in rounding.items()})
        band = Deviation(losses=1e-5, norms=1e-5, gradients=1e-5, weights=1e-5, ways=1e-4)
        if cell.optimizer == "adamw":
            noisy = deviation(self.run(cell, noise=NOISE), single)
            band = replace(band, weights=2 * noisy.weights, ways=2 * noisy.ways)
        return band


def all_cells() -> list[Cell]:
    kinds = (("fp32", "sgd"), ("fp32", "adamw"), ("bf16", "adamw"))
    return [Cell(layout, stage, *kind) for layout in LAYOUTS for stage in STAGES for kind in kinds]


def write_results(path: Path, bands: dict[str, Deviation], results: dict[Cell, Deviation]) -> None:
    """Write what was measured, for ``tests/distributed/matrix_table.py``."""
    rows = [{**asdict(cell), **asdict(found)} for cell, found in results.items()]
    content = {"bands": {name: asdict(band) for name, band in bands.items()}, "cells": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
