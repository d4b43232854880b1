"""Folds what it is told, with whichever build of the fold this interpreter finds; a process."""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

__all__ = ["Folded", "fold", "fold_by_detector", "main"]


class Folded(NamedTuple):
    """What a fold said, to the last bit."""

    records: List[str]  # JSON
    faults: Dict[str, str]
    snapshots: List[bytes]


def fold(events: Sequence[Any], snapshot: Optional[bytes] = None, at: Sequence[int] = ()) -> Folded:
    """By an engine that begins at ``snapshot`` and leaves one after ``at`` so many events, and in
    the end.
    """
    from tests.integration.law import WITNESSED

    from plarv_processors.engine import Engine

    engine = Engine(WITNESSED)
    if snapshot is not None:
        engine.restore(snapshot)
    records: List[str] = []
    snapshots: List[bytes] = []
    for number, event in enumerate(events):
        if number in at:
            snapshots.append(engine.snapshot())
        records.extend(json.dumps(record.to_dict()) for record in engine.fold(event))
        records.append(f"{engine.accepted} {engine.policy.harm_pressure!r}")
    return Folded(records, engine.faults, [*snapshots, engine.snapshot()])


def fold_by_detector(events: Sequence[Any], size: int) -> Folded:
    """By a fold of each detector, in batches, as the agents of a fleet do."""
    from plarv_processors.detector_fold import DetectorFold
    from plarv_processors.detectors import BUILTIN
    from plarv_processors.event_batch import EventBatch

    records: List[str] = []
    faults: Dict[str, str] = {}
    snapshots: List[bytes] = []
    for cls in BUILTIN:
        folded = DetectorFold(cls)
        for start in range(0, len(events), size):
            found = folded.fold(EventBatch(events[start : start + size]))
            records.extend(json.dumps(verdict.to_dict()) for verdict in found)
        if folded.fault:
            faults[cls.name] = folded.fault
        snapshots.append(folded.snapshot())
    return Folded(records, faults, snapshots)


def modules() -> Dict[str, bool]:
    """Of the package, those that are loaded, and whether they are compiled."""
    import plarv_processors.detector_fold
    import plarv_processors.engine  # noqa: F401

    return {
        name: not str(module.__file__).endswith(".py")
        for name, module in sorted(sys.modules.items())
        if name.startswith("plarv_processors.")
    }


def main() -> None:
    """Answers pickled calls (function, arguments) until stdin ends."""
    known: Dict[str, Callable[..., Any]] = {
        "fold": fold,
        "fold_by_detector": fold_by_detector,
        "modules": modules,
    }
    while True:
        try:
            name, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any = known[name](*given)
        pickle.dump(tuple(answer) if isinstance(answer, Folded) else answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
