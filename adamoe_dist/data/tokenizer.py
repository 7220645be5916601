"""What the project needs of a tokenizer, whatever made it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adamoe_dist.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json")
OWN_CLASS = "AdaMoETokenizer"
"""The class that exports of a SentencePiece tokenizer name: what decides their ids is the model file."""

Message = dict[str, Any]


class Tokenizer(ABC):
    """Text to ids and back. Instances survive pickling, whatever becomes of the files that they were read from."""

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Load a tokenizer.

        Args:
            path: a directory that ``train_tokenizer`` wrote, a SentencePiece model file, or a directory in Hugging
                Face's format: ``tokenizer.json`` or another vocabulary, and ``tokenizer_config.json``.

        Raises:
            UserError: there is no tokenizer at ``path``, or it cannot be used.
        """
        given = Path(path)
        if given.is_dir() and _is_huggingface(given):
            from adamoe_dist.data.tokenizer_huggingface import HuggingFaceTokenizer

            return HuggingFaceTokenizer.from_directory(given)
        file = given / SENTENCEPIECE_FILE if given.is_dir() else given
        if file.name == HUGGINGFACE_FILES[0]:
            raise UserError(
                f"tokenizer {path} is one file of a Hugging Face tokenizer; name its directory {given.parent}"
            )
        if not file.is_file():
            raise UserError(
                f"tokenizer {path}: there is no {file}; make one with tools/train_tokenizer.py --input PATH "
                f"--vocab-size N --output {given}, or name a directory with {HUGGINGFACE_FILES[0]}"
            )
        from adamoe_dist.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.from_file(file)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids: the highest and one."""

    @property
    @abstractmethod
    def eod_id(self) -> int:
        """The id that ends a document."""

    @property
    def prefix_ids(self) -> list[int]:
        """What it puts before every text by itself: nothing, unless it is a Hugging Face tokenizer that does so.

        :meth:`encode` leaves it out. Where it is empty, a text begins behind the end of another one.
        """
        return []

    @property
    def bos_id(self) -> int | None:
        """The id that begins every text; None where none does, though the vocabulary may have one for it."""
        return self.prefix_ids[0] if self.prefix_ids else None

    @property
    @abstractmethod
    def pad_id(self) -> int | None:
        """The padding id, where there is one."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides how text is cut."""

    @property
    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that it consists of, by name: what :meth:`load` needs, and all of it."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without any that begin or end a sequence."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""

    @property
    def chat_template(self) -> str | None:
        """The template by which conversations become text, where there is one."""
        return None

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """Return what the tokenizer's chat template makes of a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            **options: those of transformers' method of this name.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        raise UserError(
            "a SentencePiece tokenizer has no chat template; use a Hugging Face tokenizer that has one, or texts "
            "without roles"
        )

    def save(self, directory: Path) -> None:
        """Write its files into ``directory``, which is made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


def _is_huggingface(directory: Path) -> bool:
    present = [directory / name for name in HUGGINGFACE_FILES if (directory / name).is_file()]
    is_own = (directory / SENTENCEPIECE_FILE).is_file() and any(
        file.name == HUGGINGFACE_FILES[1] and OWN_CLASS.encode() in file.read_bytes() for file in present
    )
    return bool(present) and not is_own
