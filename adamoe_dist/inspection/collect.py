"""Puts a text through a model and writes down what its routers decide. Axes: T tokens, E true experts, L layers."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from adamoe_dist.errors import UserError
from adamoe_dist.inference import OpenedModel, RouterChoice, routers_of, watch_routers
from adamoe_dist.inspection.comparison import refuse_other_tokens
from adamoe_dist.inspection.pieces import token_texts
from adamoe_dist.inspection.record import LayerRoutes, Routing, TokenizedText

DEFAULT_CONTEXT = 2048
_NUMBER = re.compile(r"\.(\d+)\.")


class TextFile(NamedTuple):
    """A file and its text."""

    source: str
    text: str


def read_text_files(paths: Sequence[str]) -> list[TextFile]:
    """Read files of text in UTF-8.

    Raises:
        UserError: a file is missing, empty or not text.
    """
    return [TextFile(path, _read(Path(path))) for path in paths]


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--text {path} cannot be read ({error.strerror}); give a file of text") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {path} is not UTF-8 at byte {error.start}; convert it (iconv -t UTF-8) or give another file"
        ) from error
    if not text.strip():
        raise UserError(f"--text {path} has no text; give another file")
    return text


def cut_text(opened: OpenedModel, files: Sequence[TextFile], context: int, max_tokens: int | None) -> TokenizedText:
    """Cut files into tokens, of which the first ``max_tokens`` are kept, and into windows of ``context``.

    Each file begins a window, with the token that stands before a document; it is read and not counted.

    Raises:
        UserError: the tokenizer keeps nothing of a file.
    """
    ids: list[int] = []
    texts: list[str] = []
    positions: list[int] = []
    numbers: list[int] = []
    for number, file in enumerate(files):
        of_file = list(opened.tokenizer.encode(file.text, add_special_tokens=False))
        if max_tokens is not None:
            of_file = of_file[: max_tokens - len(ids)]
        if not of_file:
            if len(ids) == max_tokens:
                break
            raise UserError(f"--text {file.source} has no text that the tokenizer keeps; give another file")
        ids += of_file
        texts += token_texts(of_file, lambda part: _decode(opened.tokenizer, part))
        positions += [(place + 1) % context for place in range(len(of_file))]
        numbers += [number] * len(of_file)
    kept = tuple(file.source for file in files[: numbers[-1] + 1])
    return TokenizedText(
        kept, np.array(ids), tuple(texts), np.array(positions), np.array(numbers, dtype=np.int32), context
    )


def check_same_tokens(text: TokenizedText, opened: OpenedModel, files: Sequence[TextFile], name: str) -> None:
    """Refuse a second model whose tokenizer cuts the files into other tokens.

    Raises:
        UserError: it does.
    """
    ids: list[int] = []
    for file in files[: len(text.sources)]:
        ids += opened.tokenizer.encode(file.text, add_special_tokens=False)
    refuse_other_tokens(text, ids[: len(text)], name)


def collect_routing(
    opened: OpenedModel, text: TokenizedText, on_tokens: Callable[[int], Any] = lambda count: None
) -> Routing:
    """Let a model read a text, window by window, and return what its routers decided.

    Args:
        opened: the model.
        text: from :func:`cut_text`.
        on_tokens: told how many tokens were read, for progress.

    Raises:
        UserError: the model has no layer with experts.
    """
    routers = routers_of(opened.model)
    if not routers:
        raise UserError(
            f"{opened.description} has no layer with experts whose router is known; give a mixture-of-experts model"
        )
    choices: list[list[RouterChoice]] = [[] for _ in routers]
    with watch_routers(opened.model, lambda place, choice: choices[place].append(_on_cpu(choice))):
        for start, stop in _windows(text):
            _read_window(opened, text, start, stop)
            for of_router in choices:
                extra = len(of_router[-1].selected_TE) - (stop - start)
                of_router[-1] = RouterChoice(*(part[extra:] for part in of_router[-1]))
            on_tokens(stop - start)
    layers = [
        LayerRoutes(
            _number(router.name, place),
            torch.cat([choice.selected_TE for choice in of_router]).numpy(),
            torch.cat([choice.weights_TE for choice in of_router]).numpy(),
        )
        for place, (router, of_router) in enumerate(zip(routers, choices, strict=True))
    ]
    return Routing.of(opened.description, routers[0].num_null, routers[0].top_k, layers)


def _windows(text: TokenizedText) -> list[tuple[int, int]]:
    """Return the first and past-the-last token of each window."""
    changes = (np.diff(text.files_T) != 0) | (np.diff(text.positions_T) != 1)
    edges = [0, *(np.nonzero(changes)[0] + 1).tolist(), len(text)]
    return list(itertools.pairwise(edges))


@torch.inference_mode()
def _read_window(opened: OpenedModel, text: TokenizedText, start: int, stop: int) -> None:
    begins_file = start == 0 or text.files_T[start] != text.files_T[start - 1]
    before = [opened.prefix_id] if begins_file else []
    ids_BS = torch.tensor([before + text.ids_T[start:stop].tolist()], device=opened.device)
    opened.model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)


def _on_cpu(choice: RouterChoice) -> RouterChoice:
    return RouterChoice(choice.selected_TE.cpu(), choice.weights_TE.to("cpu", torch.float16))


def _number(name: str, place: int) -> int:
    """Return the number of a router's layer, which stands in its name."""
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else place


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
