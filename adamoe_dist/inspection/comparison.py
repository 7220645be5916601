"""Two models over one text: what the one uses more of than the other, token by token. Axes: L layers, T tokens."""

import math
from dataclasses import dataclass

import numpy as np

from adamoe_dist.errors import UserError
from adamoe_dist.inspection.classes import Grouping
from adamoe_dist.inspection.record import Array, Routing, TokenizedText
from adamoe_dist.inspection.statistics import MINIMUM_REPEATS


@dataclass(frozen=True)
class Difference:
    """The load of the first model minus that of the second, over the same tokens.

    Attributes:
        label: which tokens, or which layer.
        tokens: how many.
        first: true experts a token in the first model.
        second: and in the second.
        difference: first - second.
        error: standard error of ``difference``, from the spread of the tokens' own differences; NaN for one token.
    """

    label: str
    tokens: int
    first: float
    second: float
    difference: float
    error: float


def difference_of(label: str, first_T: Array, second_T: Array) -> Difference:
    """Return the difference of the means of tokens' loads, of which there is at least one."""
    changes_T = first_T.astype(np.float64) - second_T
    error = float(changes_T.std(ddof=1)) / math.sqrt(len(changes_T)) if len(changes_T) > 1 else math.nan
    return Difference(
        label, len(changes_T), float(first_T.mean()), float(second_T.mean()), float(changes_T.mean()), error
    )


def differences_by_layer(first: Routing, second: Routing) -> list[Difference]:
    """Return the difference of each layer; none where the two have experts in other layers."""
    if [layer.number for layer in first.layers] != [layer.number for layer in second.layers]:
        return []
    return [
        difference_of(f"layer {layer.number}", first_T, second_T)
        for layer, first_T, second_T in zip(first.layers, first.loads_LT, second.loads_LT, strict=True)
    ]


def differences_by_class(first: Routing, second: Routing, grouping: Grouping) -> list[Difference]:
    """Return the difference of each class of a grouping, over the means of layers."""
    first_T, second_T = first.mean_loads_T, second.mean_loads_T
    masks = {label: grouping.mask_T(label) for label in grouping.labels}
    return [difference_of(label, first_T[mask_T], second_T[mask_T]) for label, mask_T in masks.items()]


def differences_by_token(
    first: Routing, second: Routing, text: TokenizedText, minimum: int = MINIMUM_REPEATS
) -> list[Difference]:
    """Return the difference of each token that occurs ``minimum`` times or more, the most lowered first."""
    first_T, second_T = first.mean_loads_T, second.mean_loads_T
    places = text.places(minimum)
    found = [difference_of(label, first_T[place], second_T[place]) for label, place in places]
    return sorted(found, key=lambda one: (one.difference, -one.tokens, one.label))


def refuse_other_tokens(first: TokenizedText, second_ids: list[int], name: str) -> None:
    """Refuse a second model whose tokenizer cuts the text otherwise.

    Raises:
        UserError: the ids differ.
    """
    if first.ids_T.tolist() != second_ids:
        raise UserError(
            f"--compare {name}: its tokenizer cuts the text into other tokens; give a checkpoint of the same tokenizer"
        )
