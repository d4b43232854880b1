"""What a replay of many runs found, by detector: a table for people, and the same as JSON."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence

from plarv_processors.windows import median
from plarv_sinks.changes import Change, ChangeKind
from plarv_sinks.history import ReplayedRun
from plarv_sinks.labels import Agreement, Label, agreement

__all__ = ["DetectorRow", "change_line", "history_table", "summarise"]

_KINDS: Sequence[ChangeKind] = ("same", "earlier", "later", "new", "gone")


class DetectorRow(NamedTuple):
    """One detector over all runs."""

    detector: str
    counts: Mapping[ChangeKind, int]  # alarms
    earlier_steps: Optional[float]  # median of those that came earlier
    later_steps: Optional[float]
    runs: int  # with an alarm in the replay
    agreement: Optional[Agreement]  # with the labels, where there are any

    def to_dict(self) -> Dict[str, Any]:
        """JSON values only."""
        found: Dict[str, Any] = {"detector": self.detector}
        found.update({str(kind): number for kind, number in self.counts.items()})
        found.update(runs=self.runs)
        found.update(earlier_steps=self.earlier_steps, later_steps=self.later_steps)
        if self.agreement is not None:
            found.update(self.agreement._asdict())
            found.update(precision=self.agreement.precision, recall=self.agreement.recall)
        return found


def summarise(
    replayed: Sequence[ReplayedRun], labels: Optional[Mapping[str, Label]] = None
) -> List[DetectorRow]:
    """A row for each detector that gave an alarm, live or in the replay, the busiest first."""
    by_detector: Dict[str, List[Change]] = {}
    alarmed: Dict[str, List[str]] = {}
    for run in replayed:
        for change in run.changes:
            by_detector.setdefault(change.detector, []).append(change)
            if change.replayed is not None:
                alarmed.setdefault(change.detector, []).append(run.run_id)
    runs = [run.run_id for run in replayed if not run.error]
    rows: List[DetectorRow] = []
    for detector, changes in by_detector.items():
        of_runs = set(alarmed.get(detector, ()))
        counts: Dict[ChangeKind, int] = dict.fromkeys(_KINDS, 0)
        for change in changes:
            counts[change.kind] += 1
        agrees = None if labels is None else agreement(detector, labels, of_runs, runs)
        earlier = _median(-change.steps for change in changes if change.kind == "earlier")
        later = _median(change.steps for change in changes if change.kind == "later")
        rows.append(DetectorRow(detector, counts, earlier, later, len(of_runs), agrees))
    return sorted(rows, key=lambda row: (-sum(row.counts.values()), row.detector))


def history_table(rows: Sequence[DetectorRow]) -> List[List[str]]:
    """The rows as cells, below a header; what there is none of stays empty."""
    labelled = any(row.agreement is not None for row in rows)
    header = ["detector", "same", "earlier", "later", "new", "gone", "runs"]
    table = [[*header, "precision", "recall"] if labelled else header]
    for row in rows:
        counts = row.counts
        cells = [
            row.detector,
            _number(counts["same"]),
            _moved(counts["earlier"], row.earlier_steps),
            _moved(counts["later"], row.later_steps),
            _number(counts["new"]),
            _number(counts["gone"]),
            _number(row.runs),
        ]
        if labelled and row.agreement is not None:
            cells += [_share(row.agreement.precision), _share(row.agreement.recall)]
        table.append(cells)
    return table


def change_line(run_id: str, change: Change) -> str:
    """One alarm that is not as it was recorded, in one line."""
    episode = change.replayed or change.recorded
    assert episode is not None
    opened = episode.opened
    rank = "" if opened.rank is None else f" rank {opened.rank}"
    moved = f" by {abs(change.steps):,} steps" if change.steps else ""
    what = f"{opened.detector}/{opened.kind}"
    return (
        f"{change.kind}{moved}: {run_id}{rank} step {opened.step:,} {episode.level} {what}: "
        f"{opened.message}"
    )


def _median(values: Iterable[int]) -> Optional[float]:
    found = sorted(float(value) for value in values)
    return median(found) if found else None


def _number(count: int) -> str:
    return f"{count:,}" if count else ""


def _moved(count: int, steps: Optional[float]) -> str:
    return f"{count:,} (by {steps:,.0f})" if count and steps is not None else ""


def _share(share: Optional[float]) -> str:
    return "" if share is None else f"{share:.2f}"
