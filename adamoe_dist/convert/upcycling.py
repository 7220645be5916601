"""From a dense Hugging Face model to a mixture of experts (sparse upcycling, arXiv 2212.05055).

Each layer's experts are copies of its dense feed-forward, or of pieces of it: with P pieces, expert e is piece
e mod P of copy e // P. Pieces' outputs add up to the dense layer's, so what they give is multiplied by P, which the
weights of P pieces that sum to 1 divide it by. The pieces of a copy start with one router row, so that a token selects
all of a copy or none (arXiv 2410.07524); they part in training.

Legend of shapes: D inner width of the dense feed-forward, F of an expert, E experts, H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import OnBytes
from adamoe_dist.config import Config, config_from_dict, model_problems
from adamoe_dist.convert.hf_directory import CONFIG_FILE, HFDirectory
from adamoe_dist.convert.importing import ImportPlan, tokenizer_of, write_checkpoint
from adamoe_dist.convert.mapping import Names, Place, Weight, layer_prefix
from adamoe_dist.convert.null_choices import NullChoice, with_null_experts
from adamoe_dist.errors import UserError

GATE, UP, DOWN = range(3)
USUAL_TOP_K = 2
"""What ``expert_flops_saved`` compares with where ``top_k`` counts null experts' slots too."""


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of a dense feed-forward.

    Attributes:
        num_experts: E.
        top_k: slots of a token.
        expert_hidden_size: F, which divides D; None: D.
        noise: standard deviation of what is added to each expert's matrices, over that of the matrix.
        seed: of the noise and of the router's rows.
    """

    num_experts: int
    top_k: int = 2
    expert_hidden_size: int | None = None
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Copy:
    """One matrix of one expert: where it comes from."""

    layer: int
    expert: int
    kind: int
    piece: int
    pieces: int


@dataclass(frozen=True)
class UpcyclePlan:
    """What upcycling will write; everything that can be refused was.

    Attributes:
        checkpoint: as of an import.
        options: how experts are made.
        pieces: P, into which a dense feed-forward is cut.
        preserves_output: null experts are shut out at first.
    """

    checkpoint: ImportPlan
    options: Upcycling
    pieces: int
    preserves_output: bool

    @property
    def output(self) -> str:
        """What the model gives before training."""
        moe = self.checkpoint.config.moe
        nulls = 0 if self.preserves_output else moe.num_null_experts
        if self.options.noise:
            return f"near the dense model's: experts differ by noise of {self.options.noise:g}"
        if self.pieces > 1 and (nulls or moe.top_k % self.pieces):
            return f"not the dense model's: a token does not select all {self.pieces} pieces of a copy"
        if nulls >= moe.top_k:
            return "the dense model's but for tokens that take null experts only, which lose the feed-forward"
        return "the dense model's"


def plan_upcycling(source: Path, options: Upcycling, choice: NullChoice | None = None) -> UpcyclePlan:
    """Look at a dense model and say what its upcycling will write.

    Args:
        source: the Hugging Face directory.
        options: how experts are made.
        choice: null experts beside them; None: no such.

    Raises:
        UserError: the model has experts already, or such experts cannot be made of it.
    """
    choice = choice or NullChoice(0)
    directory = HFDirectory(source)
    if not directory.family.is_dense:
        raise UserError(f"--from {source} has experts already ({directory.family.model_type}); use the command import")
    dense = directory.config()
    width = dense.model.ffn_hidden_size or 4 * dense.model.hidden_size
    pieces = _pieces(options, width)
    config = _config(directory, options, width // pieces, choice)
    fingerprint, notes = tokenizer_of(directory)
    weights = _weights(directory.weights(dense), config, directory.family.names, pieces)
    routers: dict[str, Callable[[], Tensor]] = {
        f"{layer_prefix(layer)}mlp.router.weight": partial(_router_rows, config, options, pieces, layer)
        for layer in range(config.model.num_layers)
    }
    notes = (*directory.architecture.notes, *notes, *directory.left_behind)
    plan = ImportPlan(
        directory, config, weights, routers, keeps_origin=False, tokenizer_fingerprint=fingerprint, notes=notes
    )
    if choice.num_null and not choice.preserves_output:
        choice = replace(choice, top_k=options.top_k)
    return UpcyclePlan(with_null_experts(plan, choice), options, pieces, choice.preserves_output)


def upcycle(plan: UpcyclePlan, target: Path, on_bytes: OnBytes | None = None) -> Path:
    """Write the checkpoint; see :func:`adamoe_dist.convert.import_model`."""
    source = plan.checkpoint.source
    with source.open() as files:

        def read(weight: Weight, start: int, stop: int) -> Tensor:
            stored = source.tensors[weight.name]
            if not isinstance(weight, ExpertWeight):
                return files.read(stored, start, stop)
            first = 0 if weight.copy.kind == DOWN else weight.copy.piece * weight.shape[0]
            return _expert_matrix(files.read(stored, first + start, first + stop), weight, plan.options)

        return write_checkpoint(plan.checkpoint, target, read, on_bytes)


@dataclass(frozen=True)
class ExpertWeight(Weight):
    """A matrix of one expert, made of a part of the dense matrix ``name``; ``shape`` is the expert's."""

    copy: _Copy = _Copy(0, 0, GATE, 0, 1)


def _pieces(options: Upcycling, width: int) -> int:
    inner = width if options.expert_hidden_size is None else options.expert_hidden_size
    if inner < 1 or width % inner:
        raise UserError(
            f"--expert-hidden-size {inner} does not divide the dense feed-forward's width {width}; give a divisor, or "
            "leave it out for whole copies"
        )
    pieces = width // inner
    if options.num_experts % pieces:
        raise UserError(
            f"--num-experts {options.num_experts} is no multiple of the {pieces} pieces of {inner} that a dense "
            f"feed-forward of {width} is cut into; give one, so that each piece is there equally often"
        )
    return pieces


def _config(source: HFDirectory, options: Upcycling, inner: int, choice: NullChoice) -> Config:
    if not 0.0 <= options.noise <= 1.0:
        raise UserError(f"--noise {options.noise} must be between 0 and 1, at which it is as large as the weights")
    if options.num_experts < 1 or options.top_k < 1:
        raise UserError(f"--num-experts {options.num_experts} and --top-k {options.top_k} must be at least 1")
    tree: dict[str, Any] = source.config().to_dict()
    tree["model"]["ffn_hidden_size"] = None
    tree["moe"] |= {
        "num_experts": options.num_experts,
        "num_null_experts": 0,
        "top_k": min(options.top_k, options.num_experts) if choice.num_null else options.top_k,
        "reference_top_k": USUAL_TOP_K if choice.num_null and not choice.preserves_output else None,
        "expert_hidden_size": inner,
        "dense_layers": [],
    }
    config = config_from_dict(tree)
    problems = model_problems(config)
    if problems:
        asked = f"--num-experts {options.num_experts} --top-k {options.top_k}"
        raise UserError(f"{asked} and {source.path / CONFIG_FILE}: {'; '.join(problems)}")
    return config


def _weights(dense: list[Weight], config: Config, names: Names, pieces: int) -> list[Weight]:
    """Return the dense model's tensors with the experts' matrices in place of its feed-forwards'."""
    kinds = {}
    for layer in range(config.model.num_layers):
        theirs = names.layer.format(layer=layer)
        for kind, name in enumerate((names.dense_gate, names.dense_up, names.dense_down)):
            kinds[theirs + name] = layer, kind
    weights: list[Weight] = []
    for weight in dense:
        if weight.name in kinds:
            weights += _copies(weight, config, *kinds[weight.name], pieces)
        else:
            weights.append(weight)
    return weights


def _copies(weight: Weight, config: Config, layer: int, kind: int, pieces: int) -> Iterator[Weight]:
    """Yield the matrix that each expert gets of one matrix of a layer's dense feed-forward."""
    hidden, inner, experts = config.model.hidden_size, config.moe.expert_hidden_size, config.moe.num_experts
    prefix = f"{layer_prefix(layer)}mlp.experts."
    for expert in range(experts):
        copy = _Copy(layer, expert, kind, expert % pieces, pieces)
        if kind == DOWN:
            place = Place(0, hidden, (expert, 0, 0), (1, hidden, inner))
            tensor, shape, whole = f"{prefix}weight2", (hidden, inner), (experts, hidden, inner)
        else:
            place = Place(0, inner, (expert, kind * inner, 0), (1, inner, hidden))
            tensor, shape, whole = f"{prefix}weight1", (inner, hidden), (experts, 2 * inner, hidden)
        yield ExpertWeight(weight.name, shape, tensor, whole, (place,), copy=copy)


def _expert_matrix(rows: Tensor, weight: ExpertWeight, options: Upcycling) -> Tensor:
    """Return an expert's matrix in fp32: its part of the dense one, times P for what it gives, and noise."""
    copy, matrix = weight.copy, rows.float()
    if copy.kind == DOWN:
        inner = weight.shape[1]
        matrix = matrix[:, copy.piece * inner : (copy.piece + 1) * inner] * copy.pieces
    if options.noise:
        generator = platform.seeded_generator(options.seed, copy.layer, copy.expert, copy.kind, wide=False)
        draws = torch.randn(matrix.shape, generator=generator)
        matrix = matrix + options.noise * matrix.std(correction=0) * draws
    return matrix


def _router_rows(config: Config, options: Upcycling, pieces: int, layer: int) -> Tensor:
    """Return a layer's router rows (E, H), drawn for each copy and the same for its pieces."""
    copies = config.moe.num_experts // pieces
    generator = platform.seeded_generator(options.seed, layer, wide=False)
    draws = torch.randn(copies, config.model.hidden_size, generator=generator)
    return (config.model.init_std * draws).repeat_interleave(pieces, dim=0)
