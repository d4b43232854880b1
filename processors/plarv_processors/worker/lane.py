"""What one agent keeps of one partition: the folds of its runs, and how far it has read."""

from __future__ import annotations

from typing import Callable, Dict, Generic, Iterator, Optional, Protocol, Tuple, TypeVar

from plarv_processors.snapshot import pack, unpack

__all__ = ["Entry", "Fold", "Lane"]


class Fold(Protocol):
    """A pure fold over one run."""

    ended: bool

    def snapshot(self) -> bytes:
        """The whole state."""
        ...

    def restore(self, snapshot: bytes) -> None:
        """Goes on where ``snapshot`` was taken."""
        ...


F = TypeVar("F", bound=Fold)


class Entry(Generic[F]):
    """A run's fold, and the offset of the last message that it took in."""

    __slots__ = ("fold", "offset")

    def __init__(self, fold: F, offset: int = -1) -> None:
        self.fold = fold
        self.offset = offset


class Lane(Generic[F]):
    """The state of one agent for one partition: a pure function of the log before ``next``.

    ``name`` tells whose state it is: a snapshot is only taken up by a lane of the same name.
    """

    def __init__(self, name: str, partition: int, make: Callable[[], F]) -> None:
        self.name = name
        self.partition = partition
        self.next = 0  # offset of the first message that it has not folded
        self.saved = 0  # ``next`` as the last published marker has it
        self.broken = False  # a fold went on whose records were not sent
        self.runs: Dict[str, Entry[F]] = {}
        self.dirty: Dict[str, None] = {}  # runs that changed since the last snapshots
        self._make = make

    def entry(self, run_id: str, offset: int) -> Optional[Entry[F]]:
        """The run's entry, to fold the message at ``offset`` into; None: it is in there already."""
        entry = self.runs.get(run_id)
        if entry is None:
            entry = self.runs[run_id] = Entry(self._make())
        if offset <= entry.offset:
            return None
        entry.offset = offset
        self.dirty[run_id] = None
        return entry

    def packed(self, run_id: str) -> bytes:
        """The run's snapshot."""
        entry = self.runs[run_id]
        return pack((entry.offset, entry.fold.snapshot()))

    def load(self, run_id: str, packed: bytes) -> None:
        """Takes up a run's snapshot. ValueError: it is none of this lane."""
        offset, state = unpack(packed)
        fold = self._make()
        fold.restore(state)
        self.runs[run_id] = Entry(fold, offset)

    def past(self, before: int) -> Iterator[str]:
        """Ended runs of which the log holds nothing from ``before`` on."""
        for run_id, entry in self.runs.items():
            if entry.fold.ended and entry.offset < before:
                yield run_id

    def marker(self, start: int, extra: Tuple[object, ...] = ()) -> bytes:
        """The record that says from which offset the tail is to be folded."""
        return pack((start, extra))
