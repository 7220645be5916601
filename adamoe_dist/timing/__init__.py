"""Named parts of a step, and what listens to them: the clock of the metrics and the profilers' annotations."""

from adamoe_dist.timing.annotations import Annotations
from adamoe_dist.timing.clock import PhaseClock
from adamoe_dist.timing.ranges import (
    BACKWARD,
    COMBINE,
    DATA,
    DISPATCH,
    EXPERTS,
    FORWARD,
    LAYER_PARTS,
    OPTIMIZER,
    PHASES,
    PIPELINE,
    ROUTING,
    SAVE,
    SHARED_EXPERT,
    Listener,
    Ranges,
)

__all__ = [
    "BACKWARD",
    "COMBINE",
    "DATA",
    "DISPATCH",
    "EXPERTS",
    "FORWARD",
    "LAYER_PARTS",
    "OPTIMIZER",
    "PHASES",
    "PIPELINE",
    "ROUTING",
    "SAVE",
    "SHARED_EXPERT",
    "Annotations",
    "Listener",
    "PhaseClock",
    "Ranges",
]
