"""Runs that are being replayed, each by an engine of its own, and what is printed of them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple

from plarv.cli.complaint import tell
from plarv_schemas.events import LEVELS, Event, Verdict

if TYPE_CHECKING:
    from plarv_processors.engine import Engine
    from plarv_sinks.replay import Finding, RunSummary

__all__ = ["Replayed", "ReplayedRun"]


class ReplayedRun(NamedTuple):
    """One run."""

    engine: Engine
    summary: RunSummary
    findings: List[Finding]


class Replayed:
    """The runs of one source, in the order in which they came up.

    ``as_json`` prints each finding as it comes; ``keep`` keeps them for a table or a comparison.
    """

    def __init__(
        self, engine_for: Callable[[str], Engine], *, as_json: bool, keep: bool = False
    ) -> None:
        self.worst = 0  # index into LEVELS
        self.runs: Dict[str, ReplayedRun] = {}
        self._engine_for = engine_for
        self._as_json = as_json
        self._keep = keep or not as_json

    def take(self, event: Event) -> None:
        """Folds one event."""
        from plarv_sinks.replay import RunSummary, replay

        run = self.runs.get(event.run_id)
        if run is None:
            engine = self._engine_for(event.run_id)
            run = self.runs[event.run_id] = ReplayedRun(engine, RunSummary(event.run_id), [])
        for finding in replay((event,), run.engine, run.summary):
            if isinstance(finding, Verdict):
                self.worst = max(self.worst, LEVELS.index(finding.level))
            if self._as_json:
                sys.stdout.write(json.dumps(finding.to_dict(), allow_nan=False) + "\n")
            if self._keep:
                run.findings.append(finding)

    def tell_faults(self, source: str) -> None:
        """Says which detectors raised."""
        for run in self.runs.values():
            for name, reason in run.engine.faults.items():
                tell(f"{source}: detector {name} raised and was left out: {reason}")

    def print_tables(self, *, first: bool, title: str = "") -> None:
        """A table and a line for each run; ``first``: nothing was printed before."""
        from plarv_sinks.findings_table import findings_table, summary_line, wants_colour

        colour = wants_colour(sys.stdout)
        for number, run in enumerate(self.runs.values()):
            if number or not first:
                sys.stdout.write("\n")
            if title:
                sys.stdout.write(f"{title}\n")
            for line in findings_table(run.findings, colour=colour):
                sys.stdout.write(line + "\n")
            sys.stdout.write(summary_line(run.summary) + "\n")
