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
from adamoe_dist.inspection.pieces import name_of, token_texts
from adamoe_dist.inspection.record import FilePart, LayerRoutes, Routing, TokenizedText

DEFAULT_CONTEXT = 2048
COUNTED_CHARACTERS = 4_000_000
"""Of a longer file only the part that is read is cut into tokens."""
_MARGIN = 1000  # tokens next to a cut may be others than in the whole text
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
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {path} is not UTF-8 at byte {error.start}; convert it (iconv -t UTF-8) or give another file"
        ) from error
    if not text.strip():
        raise UserError(f"--text {path} has no text; give another file")
    return text


def cut_text(opened: OpenedModel, files: Sequence[TextFile], context: int, max_tokens: int | None) -> TokenizedText:
    """Cut files into tokens, of which the first ``max_tokens`` are kept, and into windows of ``context``.

    Of a file longer than ``COUNTED_CHARACTERS`` no more is cut than needed. Each file begins a window, with the token
    that stands before a document; it is read and not counted.

    Raises:
        UserError: the tokenizer keeps nothing of a file.
    """
    ids: list[int] = []
    texts: list[str] = []
    positions: list[int] = []
    numbers: list[int] = []
    parts: list[FilePart] = []
    for number, file in enumerate(files):
        left = None if max_tokens is None else max_tokens - len(ids)
        if left == 0:
            parts.append(FilePart(file.source, 0, None, 0.0))
            continue
        all_ids, is_counted = _encode(opened.tokenizer, file.text, left)
        of_file = all_ids[:left]
        if not of_file:
            raise UserError(f"--text {file.source} has no text that the tokenizer keeps; give another file")
        ids += of_file
        of_texts = token_texts(of_file, lambda part: _decode(opened.tokenizer, part))
        texts += of_texts
        positions += [(place + 1) % context for place in range(len(of_file))]
        numbers += [number] * len(of_file)
        share = len("".join(of_texts).encode()) / len(file.text.encode())
        parts.append(FilePart(file.source, len(of_file), len(all_ids) if is_counted else None, min(share, 1.0)))
    kept = tuple(part.source for part in parts if part.read)
    ids_T, files_T = np.array(ids), np.array(numbers, dtype=np.int32)
    names = _names(opened.tokenizer, sorted(set(ids)))
    return TokenizedText(kept, ids_T, tuple(texts), np.array(positions), files_T, context, names, tuple(parts))


def _encode(tokenizer: Any, text: str, wanted: int | None) -> tuple[list[int], bool]:
    """Return the first tokens of a text, ``wanted`` or more where it has them, and whether they are all."""
    length = COUNTED_CHARACTERS
    while True:
        ids = list(tokenizer.encode(text[:length], add_special_tokens=False))
        if length >= len(text):
            return ids, True
        if wanted is not None and len(ids) >= wanted + _MARGIN:
            return ids, False
        length *= 2


def _names(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return {one: name_of(piece, _decode(tokenizer, [one])) for one, piece in zip(ids, pieces, strict=True)}


def check_same_tokens(text: TokenizedText, opened: OpenedModel, files: Sequence[TextFile], name: str) -> None:
    """Refuse a second model whose tokenizer cuts the files into other tokens.

    Raises:
        UserError: it does.
    """
    ids: list[int] = []
    for file, part in zip(files, text.parts, strict=True):
        if part.read:
            ids += _encode(opened.tokenizer, file.text, part.read)[0]
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
