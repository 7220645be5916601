"""Training a SentencePiece tokenizer: byte-pair encoding with byte fallback that keeps all white space."""

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

from adamoe_dist.data.corpus import Document
from adamoe_dist.data.outputs import refuse_existing, require_writable
from adamoe_dist.data.tokenizer_sentencepiece import INFO_FILE, MODEL_FILE, SentencePieceTokenizer
from adamoe_dist.errors import UserError
from adamoe_dist.files import replacing

DEFAULT_MAX_BYTES = 8_000_000
DEFAULT_CHARACTER_COVERAGE = 0.9995

_SPECIAL_TOKENS = 4
# White space other than the space must be named, else the trainer would take it for ordinary characters
# inside words (newline) or for its own separator (tab).
_WHITE_SPACE = ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "\t\t\t", "\t\t\t\t")
_BYTES = 256
SMALLEST_VOCAB_SIZE = _BYTES + _SPECIAL_TOKENS + len(_WHITE_SPACE) + 1

_BLOCK_BYTES = 4096
_LONGEST_LINE = 4096
# A constant, because the model file records it.
_THREADS = 4


@dataclass(frozen=True)
class TrainingOptions:
    """What a tokenizer was trained with.

    Attributes:
        vocab_size: number of token ids, special ones and the 256 bytes included.
        max_bytes: the most UTF-8 bytes of text that the trainer sees.
        seed: decides which text is taken where there is more.
        character_coverage: the share of the text's characters that get a token of their own; the rest are
            written as bytes.
    """

    vocab_size: int
    max_bytes: int = DEFAULT_MAX_BYTES
    seed: int = 0
    character_coverage: float = DEFAULT_CHARACTER_COVERAGE

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the option.
        """
        if self.vocab_size < SMALLEST_VOCAB_SIZE:
            raise UserError(
                f"--vocab-size {self.vocab_size} is too small: {_BYTES} bytes and the special tokens need "
                f"{SMALLEST_VOCAB_SIZE - 1}; give {SMALLEST_VOCAB_SIZE} or more"
            )
        if self.max_bytes < 1:
            raise UserError(f"--max-bytes {self.max_bytes} leaves no text; give 1 or more")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise UserError(f"--character-coverage {self.character_coverage} is not between 0.9 and 1")


@dataclass(frozen=True)
class TrainingSummary:
    """What training saw and made.

    Attributes:
        documents: documents read.
        corpus_bytes: UTF-8 bytes read.
        sampled_bytes: UTF-8 bytes that the trainer saw.
        vocab_size: ids of the tokenizer.
        fingerprint: SHA-256 of the model file.
    """

    documents: int
    corpus_bytes: int
    sampled_bytes: int
    vocab_size: int
    fingerprint: str


def train_tokenizer(
    documents: Iterable[Document],
    vocab_size: int,
    output_dir: str | Path,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    seed: int = 0,
    character_coverage: float = DEFAULT_CHARACTER_COVERAGE,
    overwrite: bool = False,
) -> TrainingSummary:
    """Train a tokenizer and write ``tokenizer.model`` and ``tokenizer_info.json``.

    The same documents and options give the same file, byte for byte.

    Args:
        documents: read once; held in memory only up to ``max_bytes``.
        vocab_size: number of token ids.
        output_dir: made where it is missing.
        max_bytes: see `TrainingOptions`.
        seed: see `TrainingOptions`.
        character_coverage: see `TrainingOptions`.
        overwrite: replace a tokenizer that is already there.

    Raises:
        UserError: the options cannot work, the output exists or cannot be written, or the text is too
            small for the vocabulary.
    """
    options = TrainingOptions(vocab_size, max_bytes, seed, character_coverage)
    options.check()
    output = Path(output_dir)
    model_file, info_file = output / MODEL_FILE, output / INFO_FILE
    refuse_existing([model_file, info_file], overwrite)
    require_writable(output)
    sample = TextSample(max_bytes, seed)
    for document in documents:
        sample.add(document.text)
    model = _train_model(sample, options)
    tokenizer = SentencePieceTokenizer(model)
    summary = TrainingSummary(
        sample.documents, sample.seen_bytes, sample.kept_bytes, tokenizer.vocab_size, tokenizer.fingerprint
    )
    info = {**asdict(summary), "eod_id": tokenizer.eod_id, "model_type": "bpe", "options": asdict(options)}
    info_file.unlink(missing_ok=True)
    for file, content in ((model_file, model), (info_file, (json.dumps(info, indent=2) + "\n").encode())):
        with replacing(file) as unfinished:
            unfinished.write_bytes(content)
    return summary


class TextSample:
    """A sample of blocks of lines, at most ``max_bytes`` in all, chosen by a seeded hash.

    Blocks with the smallest hashes are kept, so one pass over text of unknown length is enough, and every
    block has the same chance.
    """

    def __init__(self, max_bytes: int, seed: int) -> None:
        self._max_bytes = max_bytes
        self._key = seed.to_bytes(16, "little", signed=True)
        self._heap: list[tuple[int, int, str]] = []
        self._blocks = 0
        self.documents = 0
        self.seen_bytes = 0
        self.kept_bytes = 0

    def add(self, text: str) -> None:
        """Offer the blocks of one document."""
        self.documents += 1
        for block in _blocks(text):
            self._offer(block)

    def _offer(self, block: str) -> None:
        data = block.encode("utf-8")
        self.seen_bytes += len(data)
        self.kept_bytes += len(data)
        mixed = hashlib.blake2b(data + self._blocks.to_bytes(8, "little"), digest_size=8, key=self._key)
        # Negated, because the block with the largest hash is the first to go.
        heapq.heappush(self._heap, (-int.from_bytes(mixed.digest(), "little"), self._blocks, block))
        self._blocks += 1
        while self.kept_bytes > self._max_bytes and len(self._heap) > 1:
            _, _, dropped = heapq.heappop(self._heap)
            self.kept_bytes -= len(dropped.encode("utf-8"))

    def lines(self) -> Iterator[str]:
        """Yield the lines of the sample in the order of the corpus, cut where they are very long."""
        for _, _, block in sorted(self._heap, key=lambda entry: entry[1]):
            for line in block.split("\n"):
                for start in range(0, len(line), _LONGEST_LINE):
                    yield line[start : start + _LONGEST_LINE]


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _BLOCK_BYTES) + 1
        if end == 0 or end > start + 2 * _BLOCK_BYTES:
            end = min(start + 2 * _BLOCK_BYTES, len(text))
        yield text[start:end]
        start = end


def _train_model(sample: TextSample, options: TrainingOptions) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample.lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab_size,
            byte_fallback=True,
            character_coverage=options.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(_WHITE_SPACE),
            split_digits=True,
            max_sentence_length=8 * _LONGEST_LINE,
            num_threads=_THREADS,
            minloglevel=2,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
        )
    except RuntimeError as error:
        raise _explained(str(error), options) from error
    return model.getvalue()


def _explained(message: str, options: TrainingOptions) -> Exception:
    """Turn the trainer's complaint about the vocabulary into a refusal; keep any other."""
    too_large = re.search(r"set it to a value <= (\d+)", message)
    if too_large:
        return UserError(
            f"--vocab-size {options.vocab_size} is more than this text supports; "
            f"give {too_large.group(1)} or less, or more text"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return UserError(
            f"--vocab-size {options.vocab_size} is too small for the characters of this text; "
            f"give {too_small.group(1)} or more, or a smaller --character-coverage"
        )
    return RuntimeError(message)
