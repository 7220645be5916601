"""From a Hugging Face directory to a checkpoint, matrix by matrix."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist.checkpoint import OnBytes, WeightsWriter, copy_file
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.convert.hf_directory import HFDirectory
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.origin import FILES, RECORD, record_of
from adamoe_dist.convert.outputs import new_directory
from adamoe_dist.convert.safetensors_files import TensorFiles
from adamoe_dist.convert.tokenizer_files import has_tokenizer, kept_files
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

RUN_CONFIG = "config.yaml"
ReadRows = Callable[[Weight, int, int], Tensor]
"""Returns rows ``start`` to ``stop`` of a weight, as they are in the Hugging Face model."""


@dataclass(frozen=True)
class ImportPlan:
    """What an import will write; everything that can be refused was.

    Attributes:
        source: the Hugging Face directory.
        config: the checkpoint's tree.
        weights: the tensors to take over.
        additions: canonical tensors that the source does not have, by name, made when their turn comes.
        keeps_origin: the model is the source's own, so that an export gives back its files and types.
        tokenizer_fingerprint: of the source's tokenizer as a run loads it; None: any may be used with the model.
        notes: lines on what is not taken over.
    """

    source: HFDirectory
    config: Config
    weights: list[Weight]
    additions: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    keeps_origin: bool = True
    tokenizer_fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Numbers that come from the source and its padding."""
        wholes = {weight.tensor: prod(weight.whole) for weight in self.weights}
        return sum(wholes.values())

    @property
    def bytes(self) -> int:
        """Bytes of tensors that will be written, nearly."""
        return 4 * self.elements

    def tensor(self, name: str) -> Tensor:
        """Return one canonical tensor in fp32, from the source."""
        with self.source.open() as files:
            parts = [weight for weight in self.weights if weight.tensor == name]
            whole = torch.zeros(parts[0].whole)
            for weight in parts:
                for place in weight.places:
                    rows = files.read(self.source.tensors[weight.name], place.start, place.stop)
                    spot = tuple(slice(at, at + size) for at, size in zip(place.offsets, place.sizes, strict=True))
                    whole[spot] = rows.view(place.sizes).float()
        return whole


def plan_import(source: Path, vocab_size_multiple: int | None = None) -> ImportPlan:
    """Look at a Hugging Face directory and say what its import will write.

    Args:
        source: the directory.
        vocab_size_multiple: of the padded vocabulary; None: as by default.

    Raises:
        UserError: the model cannot be taken over as it is.
    """
    directory = HFDirectory(source)
    architecture = directory.architecture
    if directory.family.is_dense:
        raise UserError(
            f"--from {source} is a dense model ({directory.family.model_type}), which has no experts to import; make "
            "some of its feed-forward layers with the command upcycle"
        )
    tree = directory.config().to_dict()
    if vocab_size_multiple is not None:
        tree["model"]["vocab_size_multiple"] = vocab_size_multiple
    config = config_from_dict(tree)
    weights = directory.weights(config)
    fingerprint, notes = tokenizer_of(directory)
    notes = (*architecture.notes, *notes, *directory.left_behind)
    return ImportPlan(directory, config, weights, tokenizer_fingerprint=fingerprint, notes=notes)


def tokenizer_of(directory: HFDirectory) -> tuple[str | None, tuple[str, ...]]:
    """Return the fingerprint of a directory's tokenizer as a run loads it, and lines on why there is none.

    Raises:
        UserError: it has ids for which there is no row of the embedding.
    """
    directory.check_tokenizer()
    if not has_tokenizer(directory.path):
        return None, ("there is no tokenizer: a run may use any that has no more ids than the embedding has rows",)
    try:
        return Tokenizer.load(directory.path).fingerprint, ()
    except UserError as problem:
        return None, (f"a run cannot use the tokenizer as it is: {problem}",)


def import_model(plan: ImportPlan, target: Path, on_bytes: OnBytes | None = None) -> Path:
    """Write a checkpoint; it appears as a whole or not at all.

    Args:
        plan: from :func:`plan_import`.
        target: a directory that is new or empty.
        on_bytes: told of every part that was written.

    Returns:
        The checkpoint directory ``target/iter_0000000``.

    Raises:
        UserError: the target is in use or has no room, or a file of the source changed.
    """
    with plan.source.open() as files:

        def read(weight: Weight, start: int, stop: int) -> Tensor:
            return files.read(plan.source.tensors[weight.name], start, stop)

        _check_copies(plan, files)
        return write_checkpoint(plan, target, read, on_bytes)


def write_checkpoint(
    plan: ImportPlan,
    target: Path,
    read: ReadRows,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Write the checkpoint of a plan whose weights' rows come from ``read``; see :func:`import_model`."""
    with new_directory(target, plan.bytes) as unfinished:
        kept = _keep_files(plan.source, unfinished / FILES)
        tree = _run_tree(plan, target)
        with WeightsWriter(unfinished, on_bytes) as writer:
            write_weights(writer, plan.weights, read)
            for name, make in plan.additions.items():
                value = make()
                writer.add(name, tuple(value.shape), (0,) * value.dim(), value)
            tensors = plan.source.tensors if plan.keeps_origin else {}
            record = record_of(plan.source.family, plan.source.architecture.vocab_size, tensors, kept)
            path = writer.finish(tree, plan.tokenizer_fingerprint, {RECORD: record})
        tree["checkpoint"]["load_weights"] = str(target.absolute())
        (unfinished / RUN_CONFIG).write_text(config_from_dict(tree).to_yaml(), encoding="utf-8")
    return target / path.name


def write_weights(writer: WeightsWriter, weights: Iterable[Weight], read: ReadRows) -> None:
    """Write every part of the weights as a block of its own, and zeros where the vocabulary is padded."""
    for weight in weights:
        for place in weight.places:
            value = read(weight, place.start, place.stop)
            writer.add(weight.tensor, weight.whole, place.offsets, value.view(place.sizes))
        if weight.pad_rows:
            rest = weight.whole[1:]
            zeros = torch.zeros(weight.pad_rows, *rest)
            writer.add(weight.tensor, weight.whole, (weight.shape[0], *(0 for _ in rest)), zeros)


def _check_copies(plan: ImportPlan, files: TensorFiles) -> None:
    """Refuse an output layer beside a tied embedding that says something else."""
    by_tensor = {weight.tensor: weight for weight in plan.weights if not weight.is_copy}
    for weight in plan.weights:
        if not weight.is_copy:
            continue
        stored, other = (plan.source.tensors[item.name] for item in (weight, by_tensor[weight.tensor]))
        if not torch.equal(files.read(stored), files.read(other)):
            raise UserError(
                f"{plan.source.path}: {weight.name} differs from {by_tensor[weight.tensor].name} although config.json "
                "says tie_word_embeddings=true; set it to false where the two are meant to differ"
            )


def _keep_files(source: HFDirectory, directory: Path) -> dict[str, Any]:
    """Copy the source's files beside the weights; return their sizes and hashes."""
    kept = {}
    for name in kept_files(source.path):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        kept[name] = copy_file(source.path / name, directory / name)
    return kept


def _run_tree(plan: ImportPlan, target: Path) -> dict[str, Any]:
    """Return the tree of the checkpoint, which a run can start from with a blend of its own."""
    tree = plan.config.to_dict()
    tree["run"]["name"] = target.absolute().name
    if has_tokenizer(plan.source.path):
        tree["data"]["tokenizer"] = str(target.absolute() / FILES)
    return tree
