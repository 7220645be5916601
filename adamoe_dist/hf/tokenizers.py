"""The transformers tokenizer of a checkpoint, and of any tokenizer of this project."""

import json
from pathlib import Path
from typing import Any

from adamoe_dist import platform
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.data import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from adamoe_dist.errors import UserError
from adamoe_dist.hf import tokenization_adamoe
from adamoe_dist.hf.tokenization_adamoe import MODEL_FILE, AdaMoETokenizer

KEPT = ("tokenizer", "huggingface")
"""Folders beside a checkpoint, or beside its run's, that hold a tokenizer."""


def tokenizer_from_checkpoint(path: str | Path) -> Any:
    """Return the transformers tokenizer of a checkpoint's model.

    Args:
        path: a checkpoint, a directory of checkpoints or a run directory, whose last complete one is meant.

    Raises:
        UserError: there is no complete checkpoint, or its tokenizer is not to be found.
    """
    platform.prepare()
    from adamoe_dist.checkpoint import checkpoint_at, read_config, read_state

    checkpoint = checkpoint_at(str(path), "checkpoint")
    config, fingerprint = config_from_dict(read_config(checkpoint)), read_state(checkpoint).get("tokenizer_fingerprint")
    return transformers_tokenizer(find_tokenizer(checkpoint, config, fingerprint))


def find_tokenizer(checkpoint: Path, config: Config, fingerprint: str | None) -> Path:
    """Return where the tokenizer lies that a checkpoint's model was trained with.

    Args:
        checkpoint: the checkpoint directory.
        config: of its run.
        fingerprint: of its tokenizer; None: the first one that is found.

    Raises:
        UserError: it is not beside the checkpoint and not where the configuration says.
    """
    folders = [checkpoint, checkpoint.parent, checkpoint.parent.parent]
    places = [folder / name for folder in folders for name in KEPT]
    places += [Path(config.data.tokenizer)] if config.data.tokenizer else []
    others = []
    for place in places:
        if not _holds_tokenizer(place):
            continue
        found = Tokenizer.load(place).fingerprint if fingerprint else None
        if found == fingerprint:
            return place
        others.append(f"; {place} has another ({str(found)[:12]})")
    wanted = f" ({fingerprint[:12]})" if fingerprint else ""
    raise UserError(
        f"the tokenizer{wanted} of {checkpoint} is neither beside it nor at data.tokenizer={config.data.tokenizer!r}"
        f"{''.join(others)}; copy it to {checkpoint.parent / KEPT[0]}"
    )


def transformers_tokenizer(place: Path) -> Any:
    """Return the transformers tokenizer of what lies at ``place``: a directory, or a SentencePiece model file."""
    tokenizer = Tokenizer.load(place)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.hf
    return AdaMoETokenizer(str(place / MODEL_FILE if place.is_dir() else place))


def write_tokenizer(place: Path | Tokenizer, directory: Path) -> None:
    """Write the files from which transformers loads a tokenizer; a SentencePiece one brings its class along.

    Args:
        place: where the tokenizer lies, or itself.
        directory: to write to.
    """
    tokenizer = place if isinstance(place, Tokenizer) else Tokenizer.load(place)
    tokenizer.save(directory)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    source = Path(tokenization_adamoe.__file__)
    (directory / source.name).write_bytes(source.read_bytes())
    settings = AdaMoETokenizer(str(directory / MODEL_FILE))
    content = {
        "tokenizer_class": AdaMoETokenizer.__name__,
        "auto_map": {"AutoTokenizer": [f"{source.stem}.{AdaMoETokenizer.__name__}", None]},
        **{name: str(token) for name, token in settings.special_tokens_map.items()},
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _holds_tokenizer(place: Path) -> bool:
    if place.is_file():
        return True
    return any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", MODEL_FILE))
