"""A tiny Llama in a GGUF file, with a byte-level tokenizer, as llama.cpp's converters write one."""

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS, HIDDEN, HEADS, GROUPS, INNER, CONTEXT = 2, 32, 4, 2, 48, 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained_tokenizer(texts: list[str], size: int) -> tuple[list[str], list[str]]:
    """Return tokens by id and merges of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in merges]


def write_gguf(path: Path, texts: list[str], size: int = 300) -> None:
    """Write a model with random weights whose tokenizer was trained on ``texts``."""
    tokens, merges = trained_tokenizer(texts, size)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    draws = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = draws.standard_normal(shape) * 0.05 if len(shape) > 1 else 1 + 0.1 * draws.standard_normal(shape)
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    narrow = HIDDEN // HEADS * GROUPS
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        add(prefix + "attn_norm.weight", HIDDEN)
        add(prefix + "ffn_norm.weight", HIDDEN)
        add(prefix + "attn_q.weight", HIDDEN, HIDDEN)
        add(prefix + "attn_k.weight", narrow, HIDDEN)
        add(prefix + "attn_v.weight", narrow, HIDDEN)
        add(prefix + "attn_output.weight", HIDDEN, HIDDEN)
        add(prefix + "ffn_gate.weight", INNER, HIDDEN)
        add(prefix + "ffn_up.weight", INNER, HIDDEN)
        add(prefix + "ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
