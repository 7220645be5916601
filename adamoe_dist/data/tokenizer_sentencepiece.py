"""The SentencePiece tokenizer: loading, and encoding that loses nothing."""

import hashlib
import re
from pathlib import Path

import sentencepiece

from adamoe_dist.data.tokenizer import Tokenizer
from adamoe_dist.errors import UserError

MODEL_FILE = "tokenizer.model"
INFO_FILE = "tokenizer_info.json"

# SentencePiece writes a space as this character and turns it back on decoding, so that a text which has the
# character itself needs help to survive.
_SPACE_MARK = "\u2581"
_LOSSLESS_PROBE = "  x \n\t y\n"
_CHUNK_CHARACTERS = 65536
_LINE_START = re.compile(r"(?<=\n)(?!\n)")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A model that ``train_tokenizer`` made is lossless: ``decode(encode(text)) == text`` for every text that
    UTF-8 can hold. Other models keep what they keep.
    """

    def __init__(self, model: bytes, name: str = MODEL_FILE) -> None:
        """Take the contents of a model file.

        Args:
            model: the serialized model.
            name: what messages call it.

        Raises:
            UserError: it is no SentencePiece model, or it has no end-of-sequence id.
        """
        self._model = model
        self._name = name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"tokenizer {name} is not a SentencePiece model; train it again") from error
        if self._processor.eos_id() < 0:
            raise UserError(f"tokenizer {name} has no end-of-sequence id; train one with tools/train_tokenizer.py")
        self._fingerprint = hashlib.sha256(model).hexdigest()
        self._lossless = self.decode(self._processor.encode(_LOSSLESS_PROBE)) == _LOSSLESS_PROBE
        self._cuts_at_lines = self._lossless and not any(
            piece.strip("\n") and "\n" in piece for piece in self._pieces()
        )
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    @classmethod
    def from_file(cls, file: Path) -> "SentencePieceTokenizer":
        """Load a model file."""
        return cls(file.read_bytes(), str(file))

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        return SentencePieceTokenizer, (self._model, self._name)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._processor.vocab_size())

    @property
    def eod_id(self) -> int:
        """The id that ends a document: the model's end-of-sequence id."""
        return int(self._processor.eos_id())

    @property
    def pad_id(self) -> int | None:
        """The padding id, where the model has one."""
        return self._optional(self._processor.pad_id())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hexadecimal."""
        return self._fingerprint

    @property
    def model(self) -> bytes:
        """The contents of the model file, for copies beside a checkpoint."""
        return self._model

    @property
    def files(self) -> dict[str, bytes]:
        """The model file."""
        return {MODEL_FILE: self._model}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without an end-of-document id."""
        if not self._lossless or self._mark_ids[0] == self._processor.unk_id():
            return list(self._processor.encode(text))
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE_MARK)):
            if index:
                ids.extend(self._mark_ids)
            for chunk in self._chunks(part):
                ids.extend(self._processor.encode(chunk))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become the replacement character."""
        return str(self._processor.decode(ids))

    def _chunks(self, text: str) -> list[str]:
        """Cut a long text, whose cost grows faster than its length, at line starts: no piece crosses them."""
        if len(text) <= _CHUNK_CHARACTERS or not self._cuts_at_lines:
            return [text]
        chunks = []
        start = 0
        while len(text) - start > _CHUNK_CHARACTERS:
            cut = _LINE_START.search(text, start + _CHUNK_CHARACTERS)
            if cut is None:
                break
            chunks.append(text[start : cut.start()])
            start = cut.start()
        return [*chunks, text[start:]]

    def _pieces(self) -> list[str]:
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @staticmethod
    def _optional(token_id: int) -> int | None:
        return token_id if token_id >= 0 else None
