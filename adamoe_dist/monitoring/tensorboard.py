"""TensorBoard's files of a run."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import text as text_summary

from adamoe_dist.config import Config
from adamoe_dist.files import RecordFile
from adamoe_dist.monitoring.event_files import keep_events, new_event_file, record_of
from adamoe_dist.monitoring.hyperparameters import session_end, session_start
from adamoe_dist.monitoring.pictures import RoutingCounts, heat_maps, histograms
from adamoe_dist.monitoring.questions import layout


class TensorBoardWriter:
    """Writes one events file: scalars, heat maps, histograms, texts, the first page, and the hyper-parameters.

    All that belongs to a step is one entry of the file.
    """

    what = "TensorBoard's files"

    def __init__(self, directory: Path, first_step: int) -> None:
        """Open a file in ``directory``; earlier files lose what they hold of steps after ``first_step``."""
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        prepare = partial(keep_events, directory, first_step)
        self._file = RecordFile(new_event_file(directory), prepare, head=record_of(version))
        self._add(layout(), 0)

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars by tag."""
        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def write_routing(self, counts: RoutingCounts, step: int) -> None:
        """Add the heat maps and the histograms of a step."""
        self._add(Summary(value=heat_maps(counts) + histograms(counts)), step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, shown as it is."""
        self._add(text_summary(tag, "\n".join(f"    {line}" for line in text.split("\n"))), step)

    def write_start(self, config: Config) -> None:
        """Add the hyper-parameters."""
        for summary in session_start(config):
            self._add(summary, 0)

    def write_end(self) -> None:
        """Say that the run is done."""
        self._add(session_end(), 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._file.add(record_of(Event(wall_time=time.time(), step=step, summary=summary)))
