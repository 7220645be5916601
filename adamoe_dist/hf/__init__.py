"""The transformers class of an AdaMoE model, registered with the Auto classes when this room is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from adamoe_dist.hf.configuration_adamoe import AdaMoEConfig
from adamoe_dist.hf.finishing import finish_export
from adamoe_dist.hf.from_checkpoint import model_from_checkpoint
from adamoe_dist.hf.modeling_adamoe import AdaMoEForCausalLM, AdaMoEModel
from adamoe_dist.hf.tokenization_adamoe import AdaMoETokenizer
from adamoe_dist.hf.tokenizers import find_tokenizer, tokenizer_from_checkpoint, transformers_tokenizer, write_tokenizer

AutoConfig.register(AdaMoEConfig.model_type, AdaMoEConfig)
AutoModel.register(AdaMoEConfig, AdaMoEModel)
AutoModelForCausalLM.register(AdaMoEConfig, AdaMoEForCausalLM)
AutoTokenizer.register(AdaMoEConfig, slow_tokenizer_class=AdaMoETokenizer)
AdaMoEConfig.register_for_auto_class()
AdaMoEModel.register_for_auto_class("AutoModel")
AdaMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AdaMoETokenizer.register_for_auto_class()

__all__ = [
    "AdaMoEConfig",
    "AdaMoEForCausalLM",
    "AdaMoEModel",
    "AdaMoETokenizer",
    "find_tokenizer",
    "finish_export",
    "model_from_checkpoint",
    "tokenizer_from_checkpoint",
    "transformers_tokenizer",
    "write_tokenizer",
]
