"""Show which tokens of a text use many experts, and which are left to null experts: a page to read in a browser."""

import argparse
from pathlib import Path

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, run_tool, say
from adamoe_dist.errors import UserError

platform.prepare()

from adamoe_dist.inspection import Outputs, Request, inspect_routing, left_out, summarise, write_report  # noqa: E402


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


def _outputs(options: argparse.Namespace) -> Outputs:
    files = [None if name is None else Path(name) for name in (options.json, options.png_dir)]
    outputs = Outputs(Path(options.output), *files)
    outputs.check(options.text, options.overwrite)
    return outputs


def main(argv: list[str]) -> None:
    """Write a report as the command line says."""
    options = _parser().parse_args(argv)
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens}: give 1 or more")
    outputs = _outputs(options)
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
    written = write_report(analysis, outputs)
    for sentence in summarise(analysis):
        say(sentence)
    names = ", ".join(str(path) for path in written[:3]) + (" ..." if len(written) > 3 else "")
    partial = left_out(analysis.text)
    say(f"written: {names}" + (f"; {partial}" if partial else ""))


if __name__ == "__main__":
    run_tool(main)
