"""A SentencePiece tokenizer for transformers that gives the ids that the model was trained on.

This file is saved beside exported weights, so it imports nothing but sentencepiece and transformers.
"""

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

MODEL_FILE = "tokenizer.model"
_SPACE_MARK = "\u2581"
_LOSSLESS_PROBE = "  x \n\t y\n"


class AdaMoETokenizer(PreTrainedTokenizer):
    """A SentencePiece model; one that keeps all white space is lossless for every text.

    SentencePiece writes a space as a character of its own, so a text that has this character is written with its bytes.
    The names of special tokens inside a text are text, as they were in training; ``split_special_tokens=False`` makes
    ids of them. No id is added before or after a text, and there is no bos_token, even where the file has one: in
    training a text begins behind the eos_token of another. Padding is on the left, as generation wants it.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(self, vocab_file: str, **options: Any) -> None:
        """Load a model file.

        Args:
            vocab_file: its path.
            **options: those of transformers.
        """
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self._is_lossless = self.processor.decode(self.processor.encode(_LOSSLESS_PROBE)) == _LOSSLESS_PROBE
        self._mark = [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()]
        self._has_bytes = self.processor.piece_to_id(self._mark[0]) != self.processor.unk_id()
        own = {
            "eos_token": self.processor.eos_id(),
            "unk_token": self.processor.unk_id(),
            "pad_token": self.processor.pad_id(),
        }
        names = {name: self.processor.id_to_piece(index) for name, index in own.items() if index >= 0}
        options = {"split_special_tokens": True, "special_tokens_pattern": "none", **names, **options}
        options.setdefault("pad_token", options.get("eos_token"))
        self._added_tokens_decoder = {
            index: AddedToken(names[name], special=True, normalized=False) for name, index in own.items() if index >= 0
        }
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the model file."""
        return int(self.processor.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        """Return every piece with its id, added tokens among them."""
        pieces = {self.processor.id_to_piece(index): index for index in range(self.vocab_size)}
        return pieces | self._added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if not self._is_lossless or not self._has_bytes:
            return list(self.processor.encode(text, out_type=str))
        pieces: list[str] = []
        for number, part in enumerate(text.split(_SPACE_MARK)):
            if number:
                pieces.extend(self._mark)
            pieces.extend(self.processor.encode(part, out_type=str))
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.processor.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.processor.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces."""
        return str(self.processor.decode([self._convert_token_to_id(token) for token in tokens]))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """Return the text of ids; special tokens by their names unless they are to be skipped."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text = ""
        plain: list[int] = []
        for index in ids:
            if index in self._added_tokens_decoder and index != self.processor.unk_id():
                text += self.processor.decode(plain)
                text += "" if skip_special_tokens else str(self._added_tokens_decoder[index])
                plain = []
            elif index < self.vocab_size:
                plain.append(int(index))
        return text + str(self.processor.decode(plain))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the model file into a directory and return its path."""
        target = Path(save_directory) / (f"{filename_prefix}-{MODEL_FILE}" if filename_prefix else MODEL_FILE)
        if target.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


__all__ = ["AdaMoETokenizer"]
