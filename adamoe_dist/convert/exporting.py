"""From a checkpoint to a Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from adamoe_dist.checkpoint import MergedReader, OnBytes, copy_file
from adamoe_dist.convert.export_plan import ExportPlan
from adamoe_dist.convert.hf_directory import CONFIG_FILE, INDEX, SINGLE
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.outputs import new_directory
from adamoe_dist.convert.safetensors_files import TensorFileWriter
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.data import Tokenizer

WriteTokenizer = Callable[[Path, Path], None]
"""Writes files that transformers can load, of the run's tokenizer at the first path, into the second."""


def export_model(
    plan: ExportPlan,
    target: Path,
    write_tokenizer: WriteTokenizer | None = None,
    on_bytes: OnBytes | None = None,
    finish: Callable[[ExportPlan, Path], None] | None = None,
) -> list[str]:
    """Write a Hugging Face directory; it appears as a whole or not at all.

    Args:
        plan: from :func:`plan_export`.
        target: a directory that is new or empty.
        write_tokenizer: writes the run's tokenizer where the model is not an imported one; None: its files as they are.
        on_bytes: told of every part that was written.
        finish: writes further files into the directory that holds everything else.

    Returns:
        Lines on what is not in it.

    Raises:
        UserError: the target is in use or has no room, or the checkpoint is damaged.
    """
    with new_directory(target, plan.bytes) as unfinished:
        with MergedReader(plan.checkpoint) as reader:
            for name, tensors in plan.shards.items():
                _write_shard(unfinished / name, tensors, reader, on_bytes)
        if SINGLE not in plan.shards:
            _write_index(unfinished / INDEX, plan)
        notes = _write_files(plan, unfinished, write_tokenizer)
        (unfinished / CONFIG_FILE).write_bytes(plan.config_json)
        for name, file in plan.family.extra_files(plan.config).items():
            copy_file(file, unfinished / name)
        if finish is not None:
            finish(plan, unfinished)
    return notes


def _write_shard(
    path: Path, tensors: list[tuple[Weight, torch.dtype]], reader: MergedReader, on_bytes: OnBytes | None
) -> None:
    writer = TensorFileWriter(path, {weight.name: (dtype, weight.shape) for weight, dtype in tensors})
    try:
        for weight, dtype in tensors:
            value = read_weight(reader, weight, dtype)
            writer.add(weight.name, value)
            if on_bytes is not None:
                on_bytes(value.nbytes)
        writer.finish()
    finally:
        writer.close()


def read_weight(reader: MergedReader, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one tensor of a Hugging Face model from a checkpoint, in its shape there."""
    if weight.is_copy:
        return reader.read(f"model.{weight.tensor}", (0,) * len(weight.shape), weight.shape).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    for place in weight.places:
        block = reader.read(f"model.{weight.tensor}", place.offsets, place.sizes)
        out[place.start : place.stop] = block.view(out[place.start : place.stop].shape)
    return out


def _write_index(path: Path, plan: ExportPlan) -> None:
    places = {weight.name: name for name, tensors in plan.shards.items() for weight, _ in tensors}
    parameters = sum(prod(weight.shape) for tensors in plan.shards.values() for weight, _ in tensors)
    content = {
        "metadata": {"total_parameters": parameters, "total_size": plan.bytes},
        "weight_map": dict(sorted(places.items())),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_files(plan: ExportPlan, directory: Path, write_tokenizer: WriteTokenizer | None) -> list[str]:
    """Give the tokenizer and what else was kept of an imported model along; return lines on what is lacking."""
    if plan.origin is not None:
        for file in sorted(plan.origin.files.iterdir()):
            is_other = plan.family is not plan.origin.family
            is_code = file.suffix == ".py" and (is_other or file.name in plan.family.extra_files(plan.config))
            if file.name != CONFIG_FILE and not is_code:
                copy_file(file, directory / file.name)
        return [] if has_tokenizer(directory) else ["the imported model had no tokenizer: none is in it"]
    if plan.tokenizer is None:
        return ["the run's tokenizer is not there: none is in it"]
    if write_tokenizer is not None:
        write_tokenizer(plan.tokenizer, directory)
        return []
    Tokenizer.load(plan.tokenizer).save(directory)
    return []
