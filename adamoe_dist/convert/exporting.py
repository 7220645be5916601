"""From a checkpoint to a Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from adamoe_dist.checkpoint import RegionReader, checkpoint_at, copy_file, read_config
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.convert.families import FAMILIES, VANILLA
from adamoe_dist.convert.family import Family, meaning
from adamoe_dist.convert.hf_directory import CONFIG_FILE, INDEX, SINGLE
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.origin import Origin, origin_of, origin_of_run
from adamoe_dist.convert.outputs import new_directory
from adamoe_dist.convert.safetensors_files import NAMES, TensorFileWriter, read_json
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

OWN_FAMILY = "adamoe"
DEFAULT_SHARD_BYTES = 5 * 10**9
OnBytes = Callable[[int], object]
WriteTokenizer = Callable[[Path, Path], None]
"""Writes files that transformers can load, of the run's tokenizer at the first path, into the second."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write; everything that can be refused was.

    Attributes:
        checkpoint: the checkpoint directory.
        config: its tree.
        family: of the Hugging Face model.
        config_json: the content of ``config.json``.
        shards: the tensors of each file, each with its type.
        origin: of an imported model.
        tokenizer: the directory whose tokenizer goes along, or the run's tokenizer; None: none is known.
    """

    checkpoint: Path
    config: Config
    family: Family
    config_json: bytes
    shards: dict[str, list[tuple[Weight, torch.dtype]]]
    origin: Origin | None
    tokenizer: Path | None

    @property
    def bytes(self) -> int:
        """Bytes of tensors that will be written."""
        tensors = (item for shard in self.shards.values() for item in shard)
        return sum(weight.elements * dtype.itemsize for weight, dtype in tensors)


def plan_export(
    source: str,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    family: str | None = None,
    vocab_size: int | None = None,
) -> ExportPlan:
    """Look at a checkpoint and say what its export will write.

    Args:
        source: a checkpoint, a directory of them, or a run directory.
        dtype: fp32, bf16 or fp16; None: as the tensors were that were imported, else fp32.
        max_shard_bytes: of a file; None: as the files were that were imported, else 5 GB.
        family: a ``model_type``; None: that of the imported model, else the first that has such a model.
        vocab_size: rows of the embedding; None: as the checkpoint or its tokenizer says.

    Raises:
        UserError: no family has such a model, or a tensor of the checkpoint has no place in it.
    """
    checkpoint = checkpoint_at(source, "--from")
    config = config_from_dict(read_config(checkpoint))
    origin = origin_of(checkpoint) or origin_of_run(config)
    tokenizer = _run_tokenizer(checkpoint, config)
    if origin is not None:
        tokenizer = origin.files if has_tokenizer(origin.files) else None
    rows = vocab_size or _vocab_size(config, origin, tokenizer)
    chosen = choose_family(config, rows, origin, family)
    is_same = origin is not None and chosen is origin.family and _is_same_model(config, origin)
    weights = list(chosen.weights(config, rows))
    if origin is None or not is_same:
        weights = [weight for weight in weights if not weight.is_copy]
    else:
        weights = [weight for weight in weights if not weight.is_copy or weight.name in origin.tensors]
    _check_tensors(checkpoint, weights, chosen)
    known = origin.tensors if origin is not None and is_same else {}
    types = {
        weight.name: NAMES[dtype] if dtype and not weight.stays_fp32 else known.get(weight.name, (torch.float32, ""))[0]
        for weight in weights
    }
    content = _config_json(config, chosen, rows, origin if is_same else None, types, dtype)
    is_as_before = known.keys() == types.keys() and max_shard_bytes is None
    shards = _old_shards(weights, types, known) if is_as_before else None
    if shards is None:
        shards = _new_shards(weights, types, max_shard_bytes or DEFAULT_SHARD_BYTES)
    return ExportPlan(checkpoint, config, chosen, content, shards, origin, tokenizer)


def choose_family(config: Config, vocab_size: int, origin: Origin | None = None, name: str | None = None) -> Family:
    """Return the family that a model is exported to.

    Raises:
        UserError: the one that was asked for, or every one there is, lacks something that the model has.
    """
    if name is not None:
        if name not in FAMILIES:
            raise UserError(f"--family {name} is not known; choose one of {', '.join(FAMILIES)}")
        candidates = [FAMILIES[name]]
    else:
        own = [FAMILIES[OWN_FAMILY]] if OWN_FAMILY in FAMILIES else []
        first = [origin.family] if origin is not None else []
        candidates = [*first, *(family for family in VANILLA if family not in first), *own]
    lacks = {}
    for family in candidates:
        problems = family.inexpressible(config, vocab_size)
        if not problems:
            return family
        lacks[family.model_type] = problems[0]
    listed = "; ".join(f"{family}: {problem}" for family, problem in lacks.items())
    raise UserError(f"no family has such a model ({listed}); see docs/huggingface.md for what each can express")


def _is_same_model(config: Config, origin: Origin) -> bool:
    values = read_json(origin.files / CONFIG_FILE)
    return meaning(origin.family.read(values).config()) == meaning(config)


def _vocab_size(config: Config, origin: Origin | None, tokenizer: Path | None) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if origin is not None:
        return origin.vocab_size
    if tokenizer is not None:
        return Tokenizer.load(tokenizer).vocab_size
    raise UserError(
        f"data.tokenizer={config.data.tokenizer} of the run is not there, so that the size of its vocabulary is not "
        "known; give --vocab-size"
    )


def _run_tokenizer(checkpoint: Path, config: Config) -> Path | None:
    """Return where a run's tokenizer is: the copy that the run keeps, or what it was given."""
    kept, given = checkpoint.parent.parent / "tokenizer", Path(config.data.tokenizer)
    if kept.is_dir():
        return kept
    return given if config.data.tokenizer and given.exists() else None


def _check_tensors(checkpoint: Path, weights: list[Weight], family: Family) -> None:
    """Check that the checkpoint has the tensors that the family needs, and no others."""
    with RegionReader(checkpoint) as reader:
        present = {key.removeprefix("model."): e.shape for key, e in reader.index.items() if key.startswith("model.")}
    wanted = {weight.tensor: weight.whole for weight in weights}
    for name, shape in wanted.items():
        if name not in present:
            raise UserError(f"{checkpoint}: tensor {name} is missing, which a {family.model_type} model needs")
        if present[name] != shape:
            raise UserError(
                f"{checkpoint}: tensor {name} has shape {present[name]}, its configuration makes it {shape}; "
                "give --vocab-size if it is the vocabulary's"
            )
    for name in present:
        if name not in wanted:
            raise UserError(f"{checkpoint}: tensor {name} has no place in a {family.model_type} model")


def _config_json(
    config: Config,
    family: Family,
    vocab_size: int,
    origin: Origin | None,
    types: dict[str, torch.dtype],
    dtype: str | None,
) -> bytes:
    """Return ``config.json``: the imported one, to the byte where the types are its own; else a new one."""
    main_type = next(iter(types.values()))
    word = str(main_type).removeprefix("torch.")
    if origin is not None:
        content = (origin.files / CONFIG_FILE).read_bytes()
        known = {name: kind for name, (kind, _) in origin.tensors.items()}
        if dtype is None or known == types:
            return content
        values = json.loads(content)
        values["dtype" if "dtype" in values else "torch_dtype"] = word
    else:
        values = {**family.write(config, vocab_size), "torch_dtype": word}
    return (json.dumps(values, indent=2) + "\n").encode()


def _old_shards(
    weights: list[Weight], types: dict[str, torch.dtype], known: dict[str, tuple[torch.dtype, str]]
) -> dict[str, list[tuple[Weight, torch.dtype]]]:
    by_name = {weight.name: weight for weight in weights}
    shards: dict[str, list[tuple[Weight, torch.dtype]]] = {}
    for name, (_, file) in known.items():
        shards.setdefault(file, []).append((by_name[name], types[name]))
    return shards


def _new_shards(
    weights: list[Weight], types: dict[str, torch.dtype], most: int
) -> dict[str, list[tuple[Weight, torch.dtype]]]:
    """Fill files of at most ``most`` bytes in the order of the layers; a tensor that is larger has one for itself."""
    parts: list[list[tuple[Weight, torch.dtype]]] = [[]]
    size = 0
    for weight in weights:
        nbytes = weight.elements * types[weight.name].itemsize
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append((weight, types[weight.name]))
        size += nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}


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
        with RegionReader(plan.checkpoint) as reader:
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
    path: Path, tensors: list[tuple[Weight, torch.dtype]], reader: RegionReader, on_bytes: OnBytes | None
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


def read_weight(reader: RegionReader, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
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
