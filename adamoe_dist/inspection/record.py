"""What is known of a text after a model has read it: its tokens, and the experts that each of them used.

Axes: T tokens, E true experts, L layers with experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FilePart:
    """How much of a file was read.

    Attributes:
        source: the file.
        read: its tokens that were read, from its start; 0: it was not read.
        tokens: all its tokens; None: not counted.
        bytes_share: part of its bytes (UTF-8) that the tokens read stand for.
    """

    source: str
    read: int
    tokens: int | None
    bytes_share: float

    @property
    def is_whole(self) -> bool:
        """All of the file was read."""
        return self.read == self.tokens


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A text cut into tokens and windows.

    Attributes:
        sources: the files that were read, in order.
        ids_T: token ids.
        texts: what each token stands for. Of the tokens that make up one character, the last one has it.
        positions_T: positions in the window that the model reads, from 0; what stands before a document counts.
        files_T: indices into ``sources``.
        context: the longest window.
        names: how each id is called where its text does not say it.
        parts: how much was read of each file that was given.
    """

    sources: tuple[str, ...]
    ids_T: Array
    texts: tuple[str, ...]
    positions_T: Array
    files_T: Array
    context: int
    names: Mapping[int, str]
    parts: tuple[FilePart, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def places(self, minimum: int) -> list[tuple[str, Array]]:
        """Return the label and the indices of each token id that occurs ``minimum`` times or more.

        The label is its text, or its name where it has not the same text everywhere (it ends several characters) or
        none.
        """
        order_T = np.argsort(self.ids_T, kind="stable")
        changes = np.nonzero(np.diff(self.ids_T[order_T]))[0] + 1
        found = [place for place in np.split(order_T, changes) if len(place) >= minimum]
        return [(self._label(place), place) for place in found]

    def _label(self, places: Array) -> str:
        texts = {self.texts[place] for place in places}
        only = texts.pop()
        return self.names[int(self.ids_T[places[0]])] if texts or not only else only


@dataclass(frozen=True, eq=False)
class LayerRoutes:
    """What the router of one layer decided.

    Attributes:
        number: the layer's number in the model, from 0.
        selected_TE: the true experts that each token used, bool.
        weights_TE: their combine weights in [0, 1], 0 where not selected, float16.
    """

    number: int
    selected_TE: Array
    weights_TE: Array


@dataclass(frozen=True, eq=False)
class Routing:
    """What the routers of a model decided over a text.

    Attributes:
        description: the model, in words.
        num_null: m, null experts of a layer.
        top_k: k, slots of a token.
        layers: the layers that have experts, in order.
        loads_LT: true experts that each token used in each of them, uint8.
    """

    description: str
    num_null: int
    top_k: int
    layers: tuple[LayerRoutes, ...]
    loads_LT: Array

    @classmethod
    def of(cls, description: str, num_null: int, top_k: int, layers: list[LayerRoutes]) -> "Routing":
        """Count the loads of ``layers``."""
        assert layers and 0 < top_k < 256, (len(layers), top_k)
        loads = [layer.selected_TE.sum(axis=1).astype(np.uint8) for layer in layers]
        return cls(description, num_null, top_k, tuple(layers), np.stack(loads))

    @property
    def num_experts(self) -> int:
        """n: true experts of a layer."""
        return int(self.layers[0].selected_TE.shape[1])

    @property
    def mean_loads_T(self) -> Array:
        """True experts of each token, the mean over the layers."""
        means: Array = self.loads_LT.mean(axis=0, dtype=np.float64)
        return means
