"""Show which tokens of a text use many experts, and which are left to null experts: a page to read in a browser."""

import argparse
from pathlib import Path

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, check_output_file, run_tool, say
from adamoe_dist.errors import UserError

platform.prepare()

from adamoe_dist.inspection import Request, inspect_routing, summarise, write_report  # noqa: E402


def _parser() -> ToolParser:
    parser = ToolParser(
        "Let a model read a text and write a page that shows how many experts each token used, in which layer, and "
        "what kinds of tokens null experts skip. The page needs no network."
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, a run directory or a Hugging Face directory"
    )
    parser.add_argument(
        "--text", required=True, action="append", metavar="FILE", help="text in UTF-8; may be given several times"
    )
    parser.add_argument("--output", required=True, metavar="REPORT.html", help="the page")
    parser.add_argument("--compare", metavar="DIR", help="a second model of the same tokenizer, to compare with")
    parser.add_argument("--max-tokens", type=int, default=20000, metavar="N", help="tokens that are read in all")
    parser.add_argument("--context", type=int, metavar="C", help="tokens of a window; without it up to 2048")
    parser.add_argument("--png-dir", metavar="DIR", help="write the pictures there, too")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, too")
    parser.add_argument("--tokenizer", metavar="DIR", help="another tokenizer than the checkpoint's")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or an accelerate map as balanced")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens}: give 1 or more")
    for name in ("output", "json"):
        value = getattr(options, name)
        if value is None:
            continue
        check_output_file(f"--{name}", value)
        if Path(value).exists() and not options.overwrite:
            raise UserError(f"--{name} {value} exists already; choose another name or add --overwrite")
    if options.png_dir is not None:
        _check_directory(Path(options.png_dir), options.overwrite)


def _check_directory(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--png-dir {path} is a file; name a directory")
    if path.is_dir() and any(path.glob("*.png")) and not overwrite:
        raise UserError(f"--png-dir {path} has pictures already; choose another directory or add --overwrite")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--png-dir {path} cannot be made ({error.strerror}); choose another directory") from error


def main(argv: list[str]) -> None:
    """Write a report as the command line says."""
    options = _parser().parse_args(argv)
    _check(options)
    request = Request(
        options.checkpoint,
        tuple(options.text),
        options.compare,
        options.max_tokens,
        options.context,
        options.dtype,
        options.device,
        options.tokenizer,
    )
    analysis = inspect_routing(request)
    json_file = None if options.json is None else Path(options.json)
    png_dir = None if options.png_dir is None else Path(options.png_dir)
    written = write_report(analysis, Path(options.output), png_dir, json_file)
    for sentence in summarise(analysis):
        say(sentence)
    say(f"written: {', '.join(str(path) for path in written[:3])}" + (" ..." if len(written) > 3 else ""))


if __name__ == "__main__":
    run_tool(main)
