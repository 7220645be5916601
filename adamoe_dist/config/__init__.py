"""One typed configuration tree: declared a file a section, read from YAML and overrides, checked together."""

from adamoe_dist.config.continuity import ABSENT, ALLOW, TOTAL_STEPS, Rule, compared_keys, is_allowed, rule_of
from adamoe_dist.config.fields import leaves
from adamoe_dist.config.layout import Layout
from adamoe_dist.config.load import config_from_dict, load_config
from adamoe_dist.config.moe import BalanceConfig, DispatcherConfig, MoEConfig
from adamoe_dist.config.tree import Config
from adamoe_dist.config.validate import Resolved, automatic_micro_batch, model_problems, resolve, schedule_problem

__all__ = [
    "ABSENT",
    "ALLOW",
    "TOTAL_STEPS",
    "BalanceConfig",
    "Config",
    "DispatcherConfig",
    "Layout",
    "MoEConfig",
    "Resolved",
    "Rule",
    "automatic_micro_batch",
    "compared_keys",
    "config_from_dict",
    "is_allowed",
    "leaves",
    "load_config",
    "model_problems",
    "resolve",
    "rule_of",
    "schedule_problem",
]
