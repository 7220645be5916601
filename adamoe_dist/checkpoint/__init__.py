"""Checkpoints that survive any change of ranks: canonical tensors in Megatron-core's distributed format."""

from adamoe_dist.checkpoint.agreement import CheckpointError
from adamoe_dist.checkpoint.compatibility import check_compatible, holds_weights_only, notes_on_cut
from adamoe_dist.checkpoint.contents import checkpoint_at, describe_checkpoint
from adamoe_dist.checkpoint.directory import (
    SUBDIRECTORY,
    UNFINISHED,
    Retention,
    Start,
    directory_problem,
    find_checkpoint,
    find_start,
    has_checkpoints,
    remove_leftovers,
    sync_directory,
)
from adamoe_dist.checkpoint.index import read_index, read_tensor
from adamoe_dist.checkpoint.load import load_checkpoint, load_weights
from adamoe_dist.checkpoint.lora import adapters_of, merge_lora, merged_weight
from adamoe_dist.checkpoint.manifest import (
    OnBytes,
    bytes_of_files,
    copy_file,
    describe_file,
    read_config,
    read_manifest,
    read_state,
    verify_files,
)
from adamoe_dist.checkpoint.merged import MergedReader
from adamoe_dist.checkpoint.null_experts import (
    bytes_to_copy,
    changed_keys,
    drawn_null_rows,
    plan_null_experts,
    set_null_experts,
)
from adamoe_dist.checkpoint.regions import RegionReader
from adamoe_dist.checkpoint.save import save_checkpoint, write_snapshot
from adamoe_dist.checkpoint.saver import CheckpointSaver, SaveTimes
from adamoe_dist.checkpoint.snapshot import Snapshot, take_snapshot
from adamoe_dist.checkpoint.weights_writer import WeightsWriter

__all__ = [
    "SUBDIRECTORY",
    "UNFINISHED",
    "CheckpointError",
    "CheckpointSaver",
    "MergedReader",
    "OnBytes",
    "RegionReader",
    "Retention",
    "SaveTimes",
    "Snapshot",
    "Start",
    "WeightsWriter",
    "adapters_of",
    "bytes_of_files",
    "bytes_to_copy",
    "changed_keys",
    "check_compatible",
    "checkpoint_at",
    "copy_file",
    "describe_checkpoint",
    "describe_file",
    "directory_problem",
    "drawn_null_rows",
    "find_checkpoint",
    "find_start",
    "has_checkpoints",
    "holds_weights_only",
    "load_checkpoint",
    "load_weights",
    "merge_lora",
    "merged_weight",
    "notes_on_cut",
    "plan_null_experts",
    "read_config",
    "read_index",
    "read_manifest",
    "read_state",
    "read_tensor",
    "remove_leftovers",
    "save_checkpoint",
    "set_null_experts",
    "sync_directory",
    "take_snapshot",
    "verify_files",
    "write_snapshot",
]
