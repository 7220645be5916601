"""One typed configuration tree: declared a file a section, read from YAML and overrides, checked together."""

from adamoe_dist.config.fields import leaves
from adamoe_dist.config.layout import Layout
from adamoe_dist.config.load import config_from_dict, load_config
from adamoe_dist.config.moe import BalanceConfig, DispatcherConfig, MoEConfig
from adamoe_dist.config.tree import Config
from adamoe_dist.config.validate import Resolved, resolve

__all__ = [
    "BalanceConfig",
    "Config",
    "DispatcherConfig",
    "Layout",
    "MoEConfig",
    "Resolved",
    "config_from_dict",
    "leaves",
    "load_config",
    "resolve",
]
