"""Train a SentencePiece tokenizer on text files, directories or the standard library of Python."""

import time
from collections.abc import Iterator

from adamoe_dist.console import ToolParser, progress, run_tool, say
from adamoe_dist.data import Document, corpus_bytes, iterate_documents, train_tokenizer, validate_inputs
from adamoe_dist.data.tokenizer_training import DEFAULT_CHARACTER_COVERAGE, DEFAULT_MAX_BYTES


def _parser() -> ToolParser:
    parser = ToolParser(
        "Train a SentencePiece tokenizer (byte-pair encoding, byte fallback, all white space kept) and write "
        "tokenizer.model and tokenizer_info.json. The same text and options give the same tokenizer."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".txt .md .rst .py .jsonl .jsonl.gz .parquet, a directory of them, or python:stdlib",
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of token ids")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for the tokenizer")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON field or parquet column")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        metavar="B",
        help="train on a seeded random sample of at most B bytes, taken in blocks of lines",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=DEFAULT_CHARACTER_COVERAGE,
        metavar="F",
        help="share of the characters with a token of their own; the rest become bytes",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sample")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer in DIR")
    return parser


def _read(inputs: list[str], text_key: str) -> Iterator[Document]:
    with progress(corpus_bytes(inputs), "B", "read") as bar:
        for document in iterate_documents(inputs, text_key):
            yield document
            bar.update(len(document.text.encode("utf-8")))


def main(argv: list[str]) -> None:
    """Train a tokenizer as the command line says."""
    options = _parser().parse_args(argv)
    started = time.monotonic()
    validate_inputs(options.input)
    summary = train_tokenizer(
        _read(options.input, options.text_key),
        options.vocab_size,
        options.output,
        max_bytes=options.max_bytes,
        seed=options.seed,
        character_coverage=options.character_coverage,
        overwrite=options.overwrite,
    )
    say(f"tokenizer    {options.output}")
    say(f"vocab size   {summary.vocab_size}")
    say(f"documents    {summary.documents}")
    say(f"text         {summary.corpus_bytes / 1e6:.1f} MB, trained on {summary.sampled_bytes / 1e6:.1f} MB")
    say(f"fingerprint  {summary.fingerprint[:16]}")
    say(f"seconds      {time.monotonic() - started:.1f}")


if __name__ == "__main__":
    run_tool(main)
