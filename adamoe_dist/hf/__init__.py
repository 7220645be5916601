"""The transformers class of an AdaMoE model, registered with the Auto classes when this room is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from adamoe_dist.hf.configuration_adamoe import AdaMoEConfig
from adamoe_dist.hf.from_checkpoint import model_from_checkpoint
from adamoe_dist.hf.modeling_adamoe import AdaMoEForCausalLM, AdaMoEModel

AutoConfig.register(AdaMoEConfig.model_type, AdaMoEConfig)
AutoModel.register(AdaMoEConfig, AdaMoEModel)
AutoModelForCausalLM.register(AdaMoEConfig, AdaMoEForCausalLM)
AdaMoEConfig.register_for_auto_class()
AdaMoEModel.register_for_auto_class("AutoModel")
AdaMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["AdaMoEConfig", "AdaMoEForCausalLM", "AdaMoEModel", "model_from_checkpoint"]
