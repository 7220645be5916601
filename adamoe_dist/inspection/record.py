"""What is known of a text after a model has read it: its tokens, and the experts that each of them used.

Axes: T tokens, E true experts, L layers with experts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A text cut into tokens and windows.

    Attributes:
        sources: the files, in order.
        ids_T: token ids.
        texts: what each token stands for. Of the tokens that make up one character, the last one has it.
        positions_T: positions in the window that the model reads, from 0; what stands before a document counts.
        files_T: indices into ``sources``.
        context: the longest window.
    """

    sources: tuple[str, ...]
    ids_T: Array
    texts: tuple[str, ...]
    positions_T: Array
    files_T: Array
    context: int

    def __len__(self) -> int:
        return len(self.texts)

    def places(self, minimum: int) -> list[tuple[str, Array]]:
        """Return the text and the indices of each token id that occurs ``minimum`` times or more."""
        order_T = np.argsort(self.ids_T, kind="stable")
        changes = np.nonzero(np.diff(self.ids_T[order_T]))[0] + 1
        found = [place for place in np.split(order_T, changes) if len(place) >= minimum]
        return [(self.texts[place[0]], place) for place in found]


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
