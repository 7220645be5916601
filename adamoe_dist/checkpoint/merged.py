"""Blocks of a checkpoint's weights as the model computes with them: low-rank adapters taken into their weights."""

from pathlib import Path

from torch import Tensor

from adamoe_dist.checkpoint.lora import adapters_of, may_be_adapted, merged_weight
from adamoe_dist.checkpoint.manifest import read_config
from adamoe_dist.checkpoint.records import TensorEntry
from adamoe_dist.checkpoint.regions import RegionReader
from adamoe_dist.model import is_adapter


class MergedReader(RegionReader):
    """Reads as :class:`RegionReader` does, but W + alpha/r B A of adapted weights; its index leaves adapters out."""

    def __init__(self, path: Path) -> None:
        """Read the index and the configuration of the checkpoint directory ``path``.

        Raises:
            UserError: one of them is not what it should be.
        """
        super().__init__(path)
        self._adapters: dict[str, TensorEntry] = {key: entry for key, entry in self.index.items() if is_adapter(key)}
        if self._adapters:
            self._alpha = float(read_config(path)["finetune"]["lora"]["alpha"])
            self.index = {key: entry for key, entry in self.index.items() if key not in self._adapters}

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return the block of ``sizes`` at ``offsets`` of weight ``key``.

        Raises:
            UserError: a file does not hold what the index says.
        """
        weight = super().read(key, offsets, sizes)
        name_a, name_b = adapters_of(key)
        if not may_be_adapted(key) or name_a not in self._adapters:
            return weight
        *experts, out_at, in_at = offsets
        *held, rows, columns = sizes
        rank = self._adapters[name_a].shape[-2]
        a = self.read_block(self._adapters[name_a], (*experts, 0, in_at), (*held, rank, columns))
        b = self.read_block(self._adapters[name_b], (*experts, out_at, 0), (*held, rows, rank))
        return merged_weight(weight, a, b, self._alpha).to(weight.dtype)
