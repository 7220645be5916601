"""What a Hugging Face directory of a checkpoint will be: its family, its config.json, its files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adamoe_dist.checkpoint import MergedReader, bytes_of_files, checkpoint_at, read_config, read_state
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.convert.export_shards import new_shards, old_shards, types_of
from adamoe_dist.convert.families import FAMILIES, VANILLA
from adamoe_dist.convert.family import Family, meaning
from adamoe_dist.convert.hf_directory import CONFIG_FILE, is_hf_directory
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.origin import FilesMissingError, Origin, origin_of, origin_of_run
from adamoe_dist.convert.safetensors_files import NAMES, read_json
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

OWN_FAMILY = "adamoe"
DEFAULT_SHARD_BYTES = 5 * 10**9
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
        notes: lines on what could not be taken over.
    """

    checkpoint: Path
    config: Config
    family: Family
    config_json: bytes
    shards: dict[str, list[tuple[Weight, torch.dtype]]]
    origin: Origin | None
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of tensors that will be written."""
        tensors = (item for shard in self.shards.values() for item in shard)
        return sum(weight.elements * dtype.itemsize for weight, dtype in tensors)

    @property
    def work_bytes(self) -> int:
        """Bytes of the checkpoint that will be verified, and of tensors that will be written."""
        return bytes_of_files(self.checkpoint) + self.bytes


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
        dtype: fp32, bf16 or fp16; None: as the tensors were that were imported (null rows: as the router), else
            fp32.
        max_shard_bytes: of a file; None: as the files were that were imported, else 5 GB.
        family: a ``model_type``; None: that of the imported model, else the first that has such a model.
        vocab_size: rows of the embedding, where neither the checkpoint nor an import says it; None: as they or the
            tokenizer say.

    Raises:
        UserError: ``vocab_size`` is not the model's, no family has such a model, or a tensor of the checkpoint has no
            place in it.
    """
    if is_hf_directory(Path(source)):
        raise UserError(
            f"--from {source} is a Hugging Face directory already; the command import makes a checkpoint of it"
        )
    checkpoint = checkpoint_at(source, "--from")
    config = config_from_dict(read_config(checkpoint))
    notes: tuple[str, ...] = ()
    try:
        origin = origin_of(checkpoint) or origin_of_run(config)
    except FilesMissingError as problem:
        origin, notes = None, (f"{problem}: exported as a model of unknown origin",)
    if origin is None:
        tokenizer = _run_tokenizer(checkpoint, config)
    else:
        tokenizer = origin.files if has_tokenizer(origin.files) else None
    rows = _vocab_size(config, origin, tokenizer, vocab_size)
    chosen = choose_family(config, rows, origin, family)
    is_same = origin is not None and chosen is origin.family and _is_same_model(config, origin)
    weights = list(chosen.weights(config, rows))
    if origin is None or not is_same:
        weights = [weight for weight in weights if not weight.is_copy]
    else:
        weights = [weight for weight in weights if not weight.is_copy or weight.name in origin.tensors]
    _check_tensors(checkpoint, weights, chosen)
    known = origin.tensors if origin is not None and is_same else {}
    types = types_of(weights, origin, None if dtype is None else NAMES[dtype])
    if origin is not None and is_same:
        content = _config_as_before(origin, types, dtype)
    else:
        values = chosen.write(config, rows) | _special_ids(origin, tokenizer) | {"torch_dtype": _main_type(types)}
        content = _json(values)
    is_as_before = known.keys() == types.keys() and max_shard_bytes is None
    if is_as_before:
        shards = old_shards(weights, types, known)
    else:
        shards = new_shards(weights, types, max_shard_bytes or DEFAULT_SHARD_BYTES)
    return ExportPlan(checkpoint, config, chosen, content, shards, origin, tokenizer, notes)


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
    refusal = "no family has such a model" if name is None else f"--family {name} has no such model"
    raise UserError(f"{refusal} ({listed}); see docs/huggingface.md for what each can express")


def _is_same_model(config: Config, origin: Origin) -> bool:
    values = read_json(origin.files / CONFIG_FILE)
    return meaning(origin.family.read(values).config()) == meaning(config)


def _vocab_size(config: Config, origin: Origin | None, tokenizer: Path | None, asked: int | None) -> int:
    """Return the rows of the embedding without padding; ``asked`` may say it only where nothing else does."""
    if asked is not None and asked < 1:
        raise UserError(f"--vocab-size {asked} must be at least 1; leave it out where the model says it")
    known = config.model.vocab_size or (origin.vocab_size if origin is not None else None)
    if known is not None:
        if asked not in (None, known):
            raise UserError(f"--vocab-size {asked} is not the model's, whose embedding has {known} rows; leave it out")
        return known
    ids = Tokenizer.load(tokenizer).vocab_size if tokenizer is not None else None
    rows = ids if asked is None else asked
    if rows is None:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} of the run is not there, so that the size of its vocabulary is "
            "not known; give --vocab-size"
        )
    if ids is not None and rows < ids:
        raise UserError(f"--vocab-size {rows} is less than the {ids} ids of the tokenizer {tokenizer}; leave it out")
    return rows


def _run_tokenizer(checkpoint: Path, config: Config) -> Path | None:
    """Return where a run's tokenizer is: the copy that the run keeps, or what it was given.

    Raises:
        UserError: what is there is another than the model was trained with.
    """
    kept, given = checkpoint.parent.parent / "tokenizer", Path(config.data.tokenizer)
    place = kept if kept.is_dir() else given
    if place is given and not (config.data.tokenizer and given.exists()):
        return None
    trained, there = read_state(checkpoint).get("tokenizer_fingerprint"), Tokenizer.load(place).fingerprint
    if trained is not None and there != trained:
        raise UserError(
            f"{place} is not the tokenizer of {checkpoint}: {there[:12]} is there, {trained[:12]} was trained with; "
            f"put that one at {kept}"
        )
    return place


def _check_tensors(checkpoint: Path, weights: list[Weight], family: Family) -> None:
    """Check that the checkpoint has the tensors that the family needs, and no others."""
    with MergedReader(checkpoint) as reader:
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


def _config_as_before(origin: Origin, types: dict[str, torch.dtype], dtype: str | None) -> bytes:
    """Return the imported ``config.json``: to the byte, but where another type was asked for."""
    content = (origin.files / CONFIG_FILE).read_bytes()
    if dtype is None or {name: kind for name, (kind, _) in origin.tensors.items()} == types:
        return content
    values = json.loads(content)
    return _json(values | {"dtype" if "dtype" in values else "torch_dtype": _main_type(types)})


def _special_ids(origin: Origin | None, tokenizer: Path | None) -> dict[str, Any]:
    """Return the ids that begin, end and pad a text: those of the imported model, else of the run's tokenizer."""
    if origin is not None:
        values = read_json(origin.files / CONFIG_FILE)
        return {name: values[name] for name in _SPECIAL_IDS if name in values}
    if tokenizer is None:
        return {}
    loaded = Tokenizer.load(tokenizer)
    return dict(zip(_SPECIAL_IDS, (loaded.bos_id, loaded.eod_id, loaded.pad_id), strict=True))


def _main_type(types: dict[str, torch.dtype]) -> str:
    return str(next(iter(types.values()))).removeprefix("torch.")


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
