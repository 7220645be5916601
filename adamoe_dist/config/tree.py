"""The whole configuration tree and its YAML form."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adamoe_dist.config.checkpoint import CheckpointConfig
from adamoe_dist.config.data import DataConfig
from adamoe_dist.config.fields import section
from adamoe_dist.config.model import ModelConfig
from adamoe_dist.config.moe import MoEConfig
from adamoe_dist.config.monitor import MonitorConfig
from adamoe_dist.config.optimizer import OptimizerConfig
from adamoe_dist.config.parallel import ParallelConfig
from adamoe_dist.config.run import RunConfig
from adamoe_dist.config.schedule import ScheduleConfig
from adamoe_dist.config.train import TrainConfig
from adamoe_dist.config.zero import ZeroConfig
from adamoe_dist.errors import UserError


@dataclass(kw_only=True)
class Config:
    """One run. DeepSpeed's dictionary and Megatron's TransformerConfig are made from it, never the reverse."""

    run: RunConfig = section(RunConfig, "Name, place, seed.")
    model: ModelConfig = section(ModelConfig, "The transformer.")
    moe: MoEConfig = section(MoEConfig, "Experts, router, dispatcher.")
    parallel: ParallelConfig = section(ParallelConfig, "Degrees of parallelism.")
    zero: ZeroConfig = section(ZeroConfig, "Optimizer sharding.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "Weight update.")
    schedule: ScheduleConfig = section(ScheduleConfig, "Learning rate.")
    data: DataConfig = section(DataConfig, "Text and tokenizer.")
    train: TrainConfig = section(TrainConfig, "Steps and batches.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Saving and resuming.")
    monitor: MonitorConfig = section(MonitorConfig, "Metrics.")

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.run.name

    @property
    def total_steps(self) -> int:
        """The length that the learning rate and the annealing are laid out for."""
        return self.schedule.total_steps or self.train.steps

    @property
    def moe_layers(self) -> list[int]:
        """Numbers, from 0, of the layers that have experts.

        They are the last of each ``moe.layer_frequency``, ``moe.dense_layers`` left out.
        """
        frequency, dense = self.moe.layer_frequency, set(self.moe.dense_layers)
        return [layer for layer in range(frequency - 1, self.model.num_layers, frequency) if layer not in dense]

    @property
    def reference_top_k(self) -> int:
        """The top-k that ``expert_flops_saved`` compares with."""
        if self.moe.reference_top_k is not None:
            return self.moe.reference_top_k
        return self.moe.top_k if self.moe.num_null_experts == 0 else 2

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Round a vocabulary up to ``model.vocab_size_multiple``.

        Args:
            vocab_size: the tokenizer's; ``model.vocab_size``, where it is set, takes its place.

        Raises:
            UserError: the tokenizer has more ids than the embedding is to have rows.
        """
        rows = self.model.vocab_size
        if rows is not None and vocab_size > rows:
            raise UserError(
                f"model.vocab_size={rows} is less than the {vocab_size} ids of data.tokenizer={self.data.tokenizer}; "
                "raise it, or use the tokenizer that the model was made with"
            )
        multiple = self.model.vocab_size_multiple
        return -(-(rows or vocab_size) // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as plain mappings."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the tree as YAML that can be loaded again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
