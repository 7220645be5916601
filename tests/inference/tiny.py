"""Tiny models with random weights in Hugging Face directories, and tokenizers for them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adamoe_dist.hf import AdaMoEConfig, AdaMoEForCausalLM

CONTEXT = 64
TEXT = [
    "The cat sat on the mat, and the dog lay by the door of the house.",
    "Question: What colour is the sky? Answer: blue. What is two and two? It is four.",
    "Ein Käfer läuft über die Straße; naïve café, 日本語 and emoji 🙂 stay whole.",
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(path: Path, with_bos: bool = True, with_chat: bool = False) -> Any:
    """Byte-level BPE that cuts everything; with ``with_bos`` it begins each text with <s>, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"] if with_bos else ["</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if with_bos else None, eos_token="</s>"
    )
    if with_chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return tokenizer


def tiny_model(family: str, vocab_size: int, **changes: Any) -> Any:
    """A model of a family with weights so large that its choices are distinct."""
    torch.manual_seed(len(family))
    shape = {
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.4,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "mixtral":
        config = MixtralConfig(**shape, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **changes)
        model = MixtralForCausalLM(config)
    elif family == "olmoe":
        config = OlmoeConfig(**shape, intermediate_size=24, num_experts=6, num_experts_per_tok=3, **changes)
        model = OlmoeForCausalLM(config)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **shape, moe_intermediate_size=24, intermediate_size=32, head_dim=8, num_experts=4, num_experts_per_tok=2,
            mlp_only_layers=[0], **changes,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config)
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=24, **changes))
    else:
        options = {"num_experts": 4, "num_null_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
        model = AdaMoEForCausalLM(AdaMoEConfig(**shape, **(options | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save_model(path: Path, family: str, with_bos: bool = True, with_chat: bool = False, **changes: Any) -> Path:
    """Write a model and its tokenizer to ``path``."""
    tokenizer = save_tokenizer(path, with_bos, with_chat)
    tiny_model(family, len(tokenizer) + 5, **changes).save_pretrained(path)
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


QUESTIONS = [
    {"id": "q1", "question": "What colour is the sky?", "choices": ["blue", "a dark green", "two"], "answer": 0},
    {"id": "q2", "question": "What is two and two?", "choices": ["four", "five houses"], "answer": "four"},
    {"id": "q3", "context": "The cat sat on ", "choices": ["the mat", "Straße 🙂"], "answer": "B"},
    {"id": "q4", "context": "", "choices": ["door", "the dog lay by the door", "house", "it"], "answer": 3},
    {"id": "q5", "context": "One. ", "question": "Which?", "choices": ["this one", "that"], "answer": 1},
]
