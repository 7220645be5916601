"""Cut text into tokens and write Megatron's indexed format, with a validation part if wanted."""

import os

from adamoe_dist.console import ToolParser, run_tool, say
from adamoe_dist.data import PartInfo, Tokenizer, prepare_corpus, validate_inputs


def _parser() -> ToolParser:
    parser = ToolParser(
        "Cut text into tokens and write PREFIX_train and PREFIX_validation (.bin, .idx, .json). Documents "
        "are assigned by a seeded hash of their text; the result does not depend on the number of workers."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".txt .md .rst .py .jsonl .jsonl.gz .parquet, a directory of them, or python:stdlib",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR|FILE",
        help="a directory from train_tokenizer.py or with a tokenizer.json, or a SentencePiece model",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path that the files' names begin with")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that cut text",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents for PREFIX_validation, at least one; 0 for none",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON field or parquet column")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split")
    parser.add_argument("--overwrite", action="store_true", help="replace data of the same PREFIX")
    return parser


def _report(prefix: str, part: PartInfo) -> None:
    say(
        f"{prefix}: {part.documents} documents, {part.bytes / 1e6:.2f} MB, {part.tokens} tokens, "
        f"{part.bytes / part.tokens:.3f} bytes/token, unigram entropy {part.unigram_entropy:.3f} nats/token"
    )


def main(argv: list[str]) -> None:
    """Prepare data as the command line says."""
    options = _parser().parse_args(argv)
    validate_inputs(options.input)
    summary = prepare_corpus(
        options.input,
        Tokenizer.load(options.tokenizer),
        options.output,
        workers=options.workers,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
        text_key=options.text_key,
        overwrite=options.overwrite,
    )
    _report(f"{options.output}_train", summary.train)
    if summary.validation is not None:
        _report(f"{options.output}_validation", summary.validation)
    say(f"seconds: {summary.seconds:.1f}")


if __name__ == "__main__":
    run_tool(main)
