"""A tokenizer in Hugging Face's format, through transformers."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adamoe_dist.data.tokenizer import Message, Tokenizer
from adamoe_dist.errors import UserError

CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"
DECISIVE = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files that decide ids. Of ``tokenizer_config.json`` all does but the keys of ``HARMLESS``."""
CHAT_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (*DECISIVE, CONFIG, *CHAT_FILES)
"""Files that a tokenizer consists of, as far as they are there."""
HARMLESS = (
    "chat_template",
    "clean_up_tokenization_spaces",
    "max_length",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "processor_class",
    "truncation_side",
)


class HuggingFaceTokenizer(Tokenizer):
    """What ``AutoTokenizer`` makes of a directory; code that lies in it is not run.

    ``encode`` takes the names of special tokens inside a text for text: a document cannot end another one.
    """

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        """Take the contents of the files.

        Args:
            files: by name, as in the directory.
            name: what messages call the tokenizer.

        Raises:
            UserError: transformers cannot read it, or it has no end-of-sequence token.
        """
        self._files, self._name = files, name
        with tempfile.TemporaryDirectory() as directory:
            for file, content in files.items():
                (Path(directory) / file).write_bytes(content)
            self._hf = _opened(directory, name)
        self._hf.model_max_length = int(1e30)  # documents are cut into samples later, so no warning about their length
        if self._hf.eos_token_id is None:
            raise UserError(
                f"tokenizer {name} has no end-of-sequence token; name one of its tokens in {CONFIG}, such as "
                '"eos_token": "</s>"'
            )
        self._fingerprint = _fingerprint(files)
        self._prefix_ids = prefix_ids_of(self._hf)
        self._vocab_size = max(self._hf.get_vocab().values()) + 1

    @classmethod
    def from_directory(cls, directory: Path) -> "HuggingFaceTokenizer":
        """Read the tokenizer's files of a directory, which may hold a model besides."""
        files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}
        if not _names_class(files) and (directory / MODEL_CONFIG).is_file():
            files[MODEL_CONFIG] = (directory / MODEL_CONFIG).read_bytes()
        return cls(files, str(directory))

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[dict[str, bytes], str]]:
        return HuggingFaceTokenizer, (self._files, self._name)

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers."""
        return self._hf

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens among them: the highest and one."""
        return self._vocab_size

    @property
    def eod_id(self) -> int:
        """The id that ends a document: the end-of-sequence token's."""
        return int(self._hf.eos_token_id)

    @property
    def prefix_ids(self) -> list[int]:
        """What it puts before every text by itself, such as Llama's beginning-of-sequence id."""
        return list(self._prefix_ids)

    @property
    def pad_id(self) -> int | None:
        """The padding id, where there is one."""
        return _optional(self._hf.pad_token_id)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides ids: a chat template or the longest length of a model may change."""
        return self._fingerprint

    @property
    def files(self) -> dict[str, bytes]:
        """Its files, as they were in the directory."""
        return dict(self._files)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without special ones."""
        return list(self._hf.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, special tokens by their names."""
        return str(self._hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def chat_template(self) -> str | None:
        """The template by which conversations become text, where there is one."""
        template = self._hf.chat_template
        return None if not template else str(template)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """Return what the tokenizer's chat template makes of a conversation; see :class:`Tokenizer`."""
        if not self._hf.chat_template:
            raise UserError(
                f"tokenizer {self._name} has no chat template; add one as {CHAT_FILES[0]}, or use texts without roles"
            )
        return self._hf.apply_chat_template(list(messages), **options)


def prefix_ids_of(hf: Any) -> list[int]:
    """Return the ids that a tokenizer of transformers puts before every text by itself."""
    text = hf.encode("a", add_special_tokens=False)
    whole = hf.encode("a")
    return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(text)] == text), [])


def _opened(directory: str, name: str) -> Any:
    """Load with transformers, which raises whatever the files lead it to."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if {file.name for file in Path(directory).iterdir()} <= {"tokenizer.json", "special_tokens_map.json"}:
            return PreTrainedTokenizerFast.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as problem:
        raise UserError(
            f"tokenizer {name} cannot be read by transformers ({type(problem).__name__}: {str(problem)[:200]}); give a "
            f"directory with tokenizer.json and {CONFIG} of a model that needs no code of its own"
        ) from problem


def _fingerprint(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        if name in DECISIVE:
            content = files[name]
        elif name == CONFIG:
            settings = _settings(files)
            content = json.dumps({key: settings[key] for key in sorted(settings) if key not in HARMLESS}).encode()
        elif name == MODEL_CONFIG:
            content = str(json.loads(files[name]).get("model_type")).encode()
        else:
            continue
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _names_class(files: dict[str, bytes]) -> bool:
    return "tokenizer_class" in _settings(files)


def _settings(files: dict[str, bytes]) -> dict[str, Any]:
    try:
        settings = json.loads(files.get(CONFIG, b"{}"))
    except ValueError:
        return {}  # transformers says what is wrong with it
    return settings if isinstance(settings, dict) else {}


def _optional(token_id: int | None) -> int | None:
    return None if token_id is None else int(token_id)
