"""From a checkpoint to a Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from adamoe_dist.checkpoint import MergedReader, OnBytes, copy_file, verify_files
from adamoe_dist.convert.export_plan import ExportPlan
from adamoe_dist.convert.hf_directory import CONFIG_FILE, INDEX, SINGLE
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.outputs import new_directory
from adamoe_dist.convert.safetensors_files import TensorFileWriter
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

WriteTokenizer = Callable[[Path, Path], None]
"""Writes files that transformers can load, of the run's tokenizer at the first path, into the second."""


def export_model(
    plan: ExportPlan,
    target: Path,
    write_tokenizer: WriteTokenizer | None = None,
    on_bytes: OnBytes | None = None,
    finish: Callable[[ExportPlan, Path], list[str]] | None = None,
) -> list[str]:
    """Write a Hugging Face directory; it appears as a whole or not at all.

    The checkpoint's files are compared with their hashes first.

    Args:
        plan: from :func:`plan_export`.
        target: a directory that is new or empty.
        write_tokenizer: writes the run's tokenizer where the model is not an imported one; None: its files as they are.
        on_bytes: told of every part that was verified or written, ``plan.work_bytes`` in all.
        finish: writes further files into the directory that holds everything else; returns further lines.

    Returns:
        Lines on what is not in it.

    Raises:
        UserError: the target is in use or has no room, the checkpoint is damaged, or a number is too large for the type
            that it is to be written in.
    """
    with new_directory(target, plan.bytes) as unfinished:
        verify_files(plan.checkpoint, on_bytes=on_bytes)
        with MergedReader(plan.checkpoint) as reader:
            for name, tensors in plan.shards.items():
                _write_shard(unfinished / name, tensors, reader, on_bytes)
        if SINGLE not in plan.shards:
            _write_index(unfinished / INDEX, plan)
        notes = [*plan.notes, *_write_files(plan, unfinished, write_tokenizer)]
        (unfinished / CONFIG_FILE).write_bytes(plan.config_json)
        for name, file in plan.family.extra_files(plan.config).items():
            copy_file(file, unfinished / name)
        if finish is not None:
            notes += finish(plan, unfinished)
    return notes


def _write_shard(
    path: Path, tensors: list[tuple[Weight, torch.dtype]], reader: MergedReader, on_bytes: OnBytes | None
) -> None:
    writer = TensorFileWriter(path, {weight.name: (dtype, weight.shape) for weight, dtype in tensors})
    try:
        for weight, dtype in tensors:
            value = read_weight(reader, weight, dtype)
            _check_range(value, weight, reader)
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


def _check_range(value: Tensor, weight: Weight, reader: MergedReader) -> None:
    """Refuse numbers that became infinite in the type of ``value``; those that the checkpoint has so stay so."""
    if value.dtype == torch.float32 or bool(value.isfinite().all()):
        return
    exact = read_weight(reader, weight)
    if torch.equal(exact.isfinite(), value.isfinite()):
        return
    largest, name = float(exact[exact.isfinite()].abs().max()), str(value.dtype).removeprefix("torch.")
    wider = "--dtype bf16 or fp32" if value.dtype == torch.float16 else "--dtype fp32"
    raise UserError(f"{weight.name} has numbers up to {largest:.3g}, which {name} does not reach; give {wider}")


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
        for name in plan.origin.names:
            file, target = plan.origin.files / name, directory / name
            is_other = plan.family is not plan.origin.family
            is_code = file.suffix == ".py" and (is_other or file.name in plan.family.extra_files(plan.config))
            if file.name != CONFIG_FILE and not is_code:
                target.parent.mkdir(exist_ok=True)
                copy_file(file, target)
        return [] if has_tokenizer(directory) else ["the imported model had no tokenizer: none is in it"]
    if plan.tokenizer is None:
        return ["the run's tokenizer is not there: none is in it"]
    if write_tokenizer is not None:
        write_tokenizer(plan.tokenizer, directory)
        return []
    Tokenizer.load(plan.tokenizer).save(directory)
    return []
