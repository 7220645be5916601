"""TensorBoard's files of a run."""

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import text as text_summary

from adamoe_dist.config import Config
from adamoe_dist.monitoring.hyperparameters import session_end, session_start
from adamoe_dist.monitoring.pictures import RoutingCounts, heat_maps, histograms
from adamoe_dist.monitoring.questions import layout


class TensorBoardWriter:
    """Writes one events file: scalars, heat maps, histograms, texts, the first page, and the hyper-parameters.

    All that belongs to a step is one entry of the file.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """Open a file in ``directory``; what earlier files hold of steps after ``first_step`` is hidden."""
        self._file = FileWriter(str(directory))
        if first_step:
            hidden_from = first_step + 1
            self._file.add_event(Event(file_version="brain.Event:2"), hidden_from)
            self._file.add_event(Event(session_log=SessionLog(status=SessionLog.START)), hidden_from)
        self._file.add_summary(layout(), 0)
        self._file.flush()

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars by tag."""
        self._add([Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], step)

    def write_routing(self, counts: RoutingCounts, step: int) -> None:
        """Add the heat maps and the histograms of a step."""
        self._add(heat_maps(counts) + histograms(counts), step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, shown as it is."""
        self._file.add_summary(text_summary(tag, "\n".join(f"    {line}" for line in text.split("\n"))), step)
        self._file.flush()

    def write_start(self, config: Config) -> None:
        """Add the hyper-parameters."""
        for summary in session_start(config):
            self._file.add_summary(summary, 0)
        self._file.flush()

    def write_end(self) -> None:
        """Say that the run is done."""
        self._file.add_summary(session_end(), 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, values: list[Summary.Value], step: int) -> None:
        self._file.add_summary(Summary(value=values), step)
        self._file.flush()
