"""A directory of a Hugging Face model: what is in it and whether it is whole, before a number is read."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from adamoe_dist.checkpoint import checkpoint_at, directory_problem
from adamoe_dist.config import Config, model_problems
from adamoe_dist.convert.families import family_of
from adamoe_dist.convert.family import Architecture, Family
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.safetensors_files import DTYPES, Stored, TensorFiles, read_header, read_json
from adamoe_dist.convert.tokenizer_files import count_ids, left_behind
from adamoe_dist.errors import UserError

CONFIG_FILE = "config.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
"""Keys of ``config.json`` by which tables grow."""
_RECOMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Buffers that old versions of transformers saved; they follow from ``config.json``."""


def is_hf_directory(path: Path) -> bool:
    """Tell whether a directory looks like a Hugging Face model's rather than a checkpoint of a run."""
    return os.path.isfile(path / CONFIG_FILE) and not os.path.isfile(path / MANIFEST)


class HFDirectory:
    """A model as ``save_pretrained`` writes it."""

    def __init__(self, path: Path, key: str = "--from") -> None:
        """Look at ``path``.

        Raises:
            UserError: it is no directory with a ``config.json`` of a known family.
        """
        if problem := directory_problem(path):
            raise UserError(f"{key} {path} {problem}; give a directory that save_pretrained wrote")
        if not (path / CONFIG_FILE).is_file() or (path / MANIFEST).is_file():
            self._refuse_checkpoint(path, key)
        self.path = path
        self.values: dict[str, Any] = read_json(path / CONFIG_FILE)
        self.family: Family = family_of(self.values, str(path / CONFIG_FILE))

    @staticmethod
    def _refuse_checkpoint(path: Path, key: str) -> None:
        try:
            found = checkpoint_at(str(path), key)
        except UserError:
            return
        raise UserError(
            f"{key} {path} has the checkpoint {found.name} and is no Hugging Face directory; the command export makes "
            "one of it"
        )

    @cached_property
    def architecture(self) -> Architecture:
        """What its ``config.json`` says; a UserError names what cannot be converted."""
        self._require_room()
        return self.family.read(self.values, str(self.path / CONFIG_FILE))

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Its tensors by name; a UserError says what the files lack."""
        if (self.path / SINGLE).is_file():
            return self._without_buffers(read_header(self.path / SINGLE))
        if not (self.path / INDEX).is_file():
            raise self._without_weights()
        return self._without_buffers(self._sharded())

    def _require_room(self) -> None:
        """Refuse more layers or experts than there are tensors, or rows of one, before a table of them is made."""
        most = max([len(self.tensors), *(size for stored in self.tensors.values() for size in stored.shape[:1])])
        for name in _COUNTS:
            value = self.values.get(name)
            if isinstance(value, int | float) and value > most:
                where = self.path / CONFIG_FILE
                raise UserError(
                    f"{where}: {name}={value!r} is more than the {len(self.tensors)} tensors beside it have room for; "
                    "fetch both again"
                )

    @property
    def shards(self) -> list[str]:
        """Its files with tensors."""
        return list(dict.fromkeys(stored.file for stored in self.tensors.values()))

    def _sharded(self) -> dict[str, Stored]:
        index_file = self.path / INDEX
        places = read_json(index_file).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise UserError(f"{index_file} has no weight_map from tensors to files; fetch it again")
        found: dict[str, Stored] = {}
        shards = list(dict.fromkeys(places.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise UserError(f"{index_file} names {shard!r}, which is outside the directory; fetch it again")
        for shard in shards:
            if not (self.path / shard).is_file():
                raise UserError(f"{self.path / shard} is missing, which {INDEX} names; fetch it")
            for name, stored in read_header(self.path / shard).items():
                if places.get(name) != shard:
                    where = f"in {places[name]}" if name in places else "nowhere"
                    raise UserError(
                        f"{self.path / shard} holds {name}, which {INDEX} says is {where}; fetch both again"
                    )
                found[name] = stored
        for name, shard in places.items():
            if name not in found:
                raise UserError(
                    f"{index_file} says that {name} is in {shard}, which does not hold it; fetch both again"
                )
        return found

    def _without_weights(self) -> UserError:
        lone = sorted(file.name for file in self.path.glob("*.safetensors"))
        if lone:
            return UserError(
                f"{self.path} has {lone[0]} without {INDEX}, which says what is in each file; fetch that too, or name "
                f"a single file {SINGLE}"
            )
        others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in self.path.glob(pattern))
        if others:
            return UserError(
                f"{self.path} has weights as {others[0]} only, not as safetensors; write it anew with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        return UserError(f"{self.path} has neither {SINGLE} nor {INDEX}; give a directory with the model's weights")

    @staticmethod
    def _without_buffers(tensors: dict[str, Stored]) -> dict[str, Stored]:
        return {name: stored for name, stored in tensors.items() if not name.endswith(_RECOMPUTED)}

    def config(self) -> Config:
        """Return the tree of its model; of a dense one nothing can train until it has experts.

        Raises:
            UserError: there is no such model here.
        """
        config = self.architecture.config()
        problems = [] if self.family.is_dense else model_problems(config)
        if problems:
            where = self.path / CONFIG_FILE
            raise UserError(f"{where} makes no model that can be had here: {'; '.join(problems)}")
        return config

    def weights(self, config: Config) -> list[Weight]:
        """Return the table of its tensors, each of which is there as the family says.

        Args:
            config: the model's sections; its ``model.vocab_size``, where it is set, is without padding.

        Raises:
            UserError: a tensor is missing, unexpected, or of another shape or a type that cannot be converted.
        """
        table = {}
        for weight in self.family.weights(config, config.model.vocab_size or self.architecture.vocab_size):
            if weight.name not in self.tensors and not weight.is_copy:
                raise UserError(f"{self.path}: tensor {weight.name} is missing, which {CONFIG_FILE} makes needed")
            table[weight.name] = weight
        for name, stored in self.tensors.items():
            where = f"{self.path / stored.file}: {name}"
            if name not in table:
                raise UserError(f"{where} is no tensor of a {self.family.model_type} model of this {CONFIG_FILE}")
            if stored.shape != table[name].shape:
                raise UserError(
                    f"{where} has shape {stored.shape}, {CONFIG_FILE} makes it {table[name].shape}; fetch both again"
                )
            if stored.dtype not in DTYPES:
                raise UserError(f"{where} is {stored.dtype}; only {', '.join(DTYPES)} can be converted")
        return [weight for name, weight in table.items() if name in self.tensors]

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that has ids for which there is no row of the embedding."""
        ids, rows = count_ids(self.path), self.architecture.vocab_size
        if ids is not None and ids > rows:
            raise UserError(
                f"{self.path}: the tokenizer has {ids} ids, the embedding only {rows} rows (vocab_size={rows}); take "
                "the tokenizer that the model was trained with, or resize the embedding with transformers"
            )

    @property
    def left_behind(self) -> tuple[str, ...]:
        """One line on the files that are neither weights nor kept; nothing where there are none."""
        names = left_behind(self.path, {*self.shards, INDEX})
        return (f"not taken along: {', '.join(names)}",) if names else ()

    def open(self) -> TensorFiles:
        """Return a reader of its tensors."""
        return TensorFiles(self.path)
