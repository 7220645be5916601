"""Small tokenizers in Hugging Face's format."""

import json
from pathlib import Path
from typing import Any

from tests.data.conftest import words

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"


def write_bpe(directory: Path, vocab_size: int = 300, **settings: Any) -> Path:
    """Write a byte-level BPE whose last ids are tokens added after training; ``settings`` None leave a key out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([words(seed, 400) for seed in range(8)], trainer)
    raw.add_special_tokens(["<|user|>", "<|assistant|>"])
    directory.mkdir(parents=True, exist_ok=True)
    raw.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "model_max_length": 32,
        **settings,
    }
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return directory
