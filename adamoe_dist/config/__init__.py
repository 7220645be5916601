"""One typed configuration tree: declared a file a section, read from YAML and overrides, checked together."""

from adamoe_dist.config.buckets import bucket_sizes
from adamoe_dist.config.continuity import (
    ABSENT,
    ALLOW,
    TOTAL_STEPS,
    Rule,
    compared_keys,
    flattened,
    is_allowed,
    rule_of,
)
from adamoe_dist.config.fields import leaves
from adamoe_dist.config.finetune import FinetuneConfig, LoraConfig
from adamoe_dist.config.layout import Layout
from adamoe_dist.config.load import config_from_dict, load_config, overridden_keys, read_values
from adamoe_dist.config.moe import BalanceConfig, DispatcherConfig, MoEConfig
from adamoe_dist.config.monitor import ProfileConfig
from adamoe_dist.config.tree import Config
from adamoe_dist.config.validate import Resolved, automatic_micro_batch, model_problems, resolve, schedule_problem
from adamoe_dist.config.validate_finetune import check_fine_tuning, check_pre_training
from adamoe_dist.config.validate_monitor import profile_steps_problem

__all__ = [
    "ABSENT",
    "ALLOW",
    "TOTAL_STEPS",
    "BalanceConfig",
    "Config",
    "DispatcherConfig",
    "FinetuneConfig",
    "Layout",
    "LoraConfig",
    "MoEConfig",
    "ProfileConfig",
    "Resolved",
    "Rule",
    "automatic_micro_batch",
    "bucket_sizes",
    "check_fine_tuning",
    "check_pre_training",
    "compared_keys",
    "config_from_dict",
    "flattened",
    "is_allowed",
    "leaves",
    "load_config",
    "model_problems",
    "overridden_keys",
    "profile_steps_problem",
    "read_values",
    "resolve",
    "rule_of",
    "schedule_problem",
]
