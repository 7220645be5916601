"""Which experts a token uses: selection, balance losses, statistics and initialisation of the null rows."""

from adamoe_dist.routing.selection import Normalize, Selection, select

__all__ = [
    "Normalize",
    "Selection",
    "select",
]
