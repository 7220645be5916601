"""From and to Hugging Face: families as tables of names, tensors one by one, nothing dropped silently."""

from adamoe_dist.convert.export_plan import ExportPlan, choose_family, plan_export
from adamoe_dist.convert.exporting import export_model, read_weight
from adamoe_dist.convert.families import FAMILIES, VANILLA, family_of
from adamoe_dist.convert.family import Architecture, Family, meaning
from adamoe_dist.convert.hf_config import HFConfig
from adamoe_dist.convert.hf_directory import HFDirectory, is_hf_directory
from adamoe_dist.convert.importing import ImportPlan, import_model, plan_import, write_checkpoint, write_weights
from adamoe_dist.convert.load_report import LayerLoad, measure_load, read_load_report
from adamoe_dist.convert.mapping import (
    Names,
    Place,
    Weight,
    attention_weights,
    expert_matrix,
    feed_forward_weights,
    layer_prefix,
    stacked,
    standard_weights,
    whole_weight,
)
from adamoe_dist.convert.megatron_model import megatron_model
from adamoe_dist.convert.null_choices import NullChoice, with_null_experts
from adamoe_dist.convert.origin import FILES, Origin, imported_family, origin_of, origin_of_run
from adamoe_dist.convert.tokenizer_files import TERMS
from adamoe_dist.convert.upcycling import UpcyclePlan, Upcycling, plan_upcycling, upcycle
from adamoe_dist.convert.verifying import Comparing

__all__ = [
    "FAMILIES",
    "FILES",
    "TERMS",
    "VANILLA",
    "Architecture",
    "Comparing",
    "ExportPlan",
    "Family",
    "HFConfig",
    "HFDirectory",
    "ImportPlan",
    "LayerLoad",
    "Names",
    "NullChoice",
    "Origin",
    "Place",
    "UpcyclePlan",
    "Upcycling",
    "Weight",
    "attention_weights",
    "choose_family",
    "expert_matrix",
    "export_model",
    "family_of",
    "feed_forward_weights",
    "import_model",
    "imported_family",
    "is_hf_directory",
    "layer_prefix",
    "meaning",
    "measure_load",
    "megatron_model",
    "origin_of",
    "origin_of_run",
    "plan_export",
    "plan_import",
    "plan_upcycling",
    "read_load_report",
    "read_weight",
    "stacked",
    "standard_weights",
    "upcycle",
    "whole_weight",
    "with_null_experts",
    "write_checkpoint",
    "write_weights",
]
