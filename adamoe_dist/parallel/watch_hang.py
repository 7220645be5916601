"""Rank 0's judgement of a run that does not get on: asks what every rank is doing, and names the one that hangs.

No rank is blamed for being slow: the ranks of a run wait for each other, so that one that hangs stops all, and the run
hangs when no rank at all has made progress for ``monitor.hang_timeout_s``.
"""

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from adamoe_dist.parallel.progress import Progress
from adamoe_dist.parallel.stacks import Doing, doing
from adamoe_dist.parallel.watch_wire import ANSWER_S, HANGS, SILENT_RANK, Departure


class HangWatch:
    """Collects the ranks' progress and, once there is none, their answers.

    Attributes:
        place: rank 0's.
    """

    def __init__(self, place: Departure, progress: Progress, timeout_s: float) -> None:
        """Watch with rank 0's own ``progress`` and those that :meth:`note` brings."""
        self.place = place
        self._progress = progress
        self._timeout_s = timeout_s
        self._progress_at: dict[int, float] = {}
        self._answers: dict[int, Doing] = {}
        self._asked_at: float | None = None

    def note(self, rank: int, age_s: float) -> None:
        """Take a rank's word that its last progress was so long ago."""
        self._progress_at[rank] = time.monotonic() - age_s

    def note_own(self) -> None:
        """Take rank 0's."""
        if self._progress.count:
            self._progress.note_traffic()
            self.note(self.place.rank, self._progress.age_s)

    def answer(self, rank: int, what: Doing) -> None:
        """Take a rank's answer."""
        self._answers[rank] = what

    @property
    def quiet_s(self) -> float:
        """Seconds since any rank made progress; 0 before the first step."""
        return time.monotonic() - max(self._progress_at.values()) if self._progress_at else 0.0

    def is_to_ask(self) -> bool:
        """Whether the ranks are to be asked now: nothing gets on, and they were not asked yet."""
        if self.quiet_s <= self._timeout_s:
            self._asked_at = None
            return False
        if self._asked_at is not None:
            return False
        self._asked_at = time.monotonic()
        self._answers = {self.place.rank: doing()}
        return True

    def has_heard(self, others: Collection[int]) -> bool:
        """Whether all that were asked answered, or had the time to."""
        if self._asked_at is None:
            return False
        return self._answers.keys() >= set(others) or time.monotonic() > self._asked_at + ANSWER_S

    def verdict(self, others: Mapping[int, Departure]) -> Departure:
        """Name the rank that hangs, from the answers of the other ranks that were asked."""
        places = {self.place.rank: self.place, **others}
        guilty = culprits(places, self._answers)
        cause = f"(no progress for {self.quiet_s:.0f} s) {complaint(guilty[0], guilty[1:], places, self._answers)}"
        stacks = (
            f"rank {rank} on {places[rank].host} {self._answers[rank]}\n{self._answers[rank].stack}\n"
            for rank in sorted(places.keys() & self._answers.keys())
        )
        return replace(places[guilty[0]], cause=cause, kind=HANGS, details="".join(stacks))


def culprits(ranks: Collection[int], answers: Mapping[int, Doing]) -> list[int]:
    """Return the ranks that keep the others waiting.

    They are those that do not answer; else those in no collective; else those in another than most, of which a tie
    leaves nobody out. All ranks are returned where all are at the same place.
    """
    silent = sorted(set(ranks) - answers.keys())
    if silent:
        return silent
    outside = sorted(rank for rank in ranks if answers[rank].operation is None)
    if outside:
        return outside
    where = {rank: (answers[rank].operation, answers[rank].place) for rank in sorted(ranks)}
    counts = Counter(where.values())
    most = max(counts.values())
    usual = [place for place, count in counts.items() if count == most]
    others = [rank for rank, place in where.items() if len(usual) > 1 or place != usual[0]]
    return others or sorted(ranks)


def complaint(rank: int, as_well: list[int], ranks: Collection[int], answers: Mapping[int, Doing]) -> str:
    """Say in one line what a rank does, which ranks hang as well, and what the others do."""
    words = str(answers[rank]) if rank in answers else SILENT_RANK
    listed = [f"rank {other} {answers.get(other, SILENT_RANK)}" for other in as_well[:3]]
    rest = Counter(str(answers[other]) for other in ranks if other in answers and other not in (rank, *as_well))
    listed += [f"{count} other rank{'s' if count > 1 else ''}: {what}" for what, count in rest.most_common(2)]
    return "; ".join([words, *listed])
