"""From a checkpoint and files of text to the report's files."""

import json
from dataclasses import dataclass
from pathlib import Path

from adamoe_dist.console import progress
from adamoe_dist.errors import UserError
from adamoe_dist.inference import OpenedModel, longest_input, open_model
from adamoe_dist.inspection.analysis import Analysis, analyse
from adamoe_dist.inspection.collect import (
    DEFAULT_CONTEXT,
    check_same_tokens,
    collect_routing,
    cut_text,
    read_text_files,
)
from adamoe_dist.inspection.figures import all_figures
from adamoe_dist.inspection.outputs import Outputs
from adamoe_dist.inspection.page import render_page
from adamoe_dist.inspection.png import to_png
from adamoe_dist.inspection.record import Routing, TokenizedText


@dataclass(frozen=True)
class Request:
    """What to look at, and how.

    Attributes:
        checkpoint: a checkpoint, a run directory or a Hugging Face directory.
        texts: files of text in UTF-8.
        compare: a second model of the same tokenizer; None: none.
        max_tokens: tokens read in all; None: all.
        context: tokens of a window; None: what the models read, 2048 at most.
        dtype: as :func:`open_model` takes it.
        device: as :func:`open_model` takes it.
        tokenizer: another tokenizer than the checkpoints'; None: theirs.
    """

    checkpoint: str
    texts: tuple[str, ...]
    compare: str | None = None
    max_tokens: int | None = None
    context: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    tokenizer: str | None = None


def inspect_routing(request: Request) -> Analysis:
    """Let the models read the text, and return all numbers of a report.

    Raises:
        UserError: the request cannot be met.
    """
    files = read_text_files(request.texts)
    context = _context(request)
    opened = _open(request.checkpoint, request)
    text = cut_text(opened, files, context, request.max_tokens)
    routing = _collect(opened, text, "read")
    del opened
    if request.compare is None:
        return analyse(text, routing)
    other = _open(request.compare, request)
    check_same_tokens(text, other, files, request.compare)
    return analyse(text, routing, _collect(other, text, "read with the other model"))


def write_report(analysis: Analysis, outputs: Outputs) -> list[Path]:
    """Write the page, and where asked for the pictures and the numbers; return the files.

    Raises:
        UserError: a file cannot be written; then none is.
    """
    figures = all_figures(analysis)
    pictures = {}
    if outputs.png_dir is not None:
        with progress(len(figures), "picture", "draw") as bar:
            for name, figure in figures.items():
                pictures[name] = to_png(figure)
                bar.update()
    numbers = json.dumps(analysis.as_json(), indent=1, ensure_ascii=False) + "\n"
    return outputs.write(render_page(analysis, figures), numbers, pictures)


def _open(place: str, request: Request) -> OpenedModel:
    return open_model(place, request.dtype, request.device, request.tokenizer)


def _collect(opened: OpenedModel, text: TokenizedText, description: str) -> Routing:
    with progress(len(text), "token", description) as bar:
        return collect_routing(opened, text, bar.update)


def _context(request: Request) -> int:
    places = [request.checkpoint, *([request.compare] if request.compare else [])]
    longest = min(longest_input(place) for place in places)
    chosen = min(longest, DEFAULT_CONTEXT) if request.context is None else request.context
    if not 2 <= chosen <= longest:
        raise UserError(f"--context {chosen}: the model reads up to {longest} tokens; give 2 to {longest}")
    return chosen
