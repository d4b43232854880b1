"""``argus replay --from STORE``: history through the detectors of today, beside what they said."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from plarv.cli.brokers import told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.export import ProgressBar
from plarv.cli.table import aligned

if TYPE_CHECKING:
    from plarv_processors.engine import EngineConfig
    from plarv_sinks.changes import Change
    from plarv_sinks.history import ReplayedRun
    from plarv_sinks.labels import Label

__all__ = ["names_in", "replay_store"]

_SHOWN = 20  # alarms that are not as they were recorded; --json has all
_DAY_S = 86_400.0


def replay_store(options: argparse.Namespace, config: EngineConfig) -> Tuple[int, bool]:
    """Replays runs of a store: the worst level found, and whether something was wrong."""
    with told():
        from plarv_sinks.history import History, replay_history

        history = History(
            options.source,
            tuple(options.detector),
            config.without,
            config.mode,
        )
        runs = _runs(options)
        labels = _labels(options.labels)
        begun, bar = time.monotonic(), ProgressBar(f"replay {len(runs):,} runs", sys.stderr)
        replayed: List[ReplayedRun] = []
        try:
            for run in replay_history(history, runs, options.jobs or os.cpu_count() or 1):
                replayed.append(run)
                bar.show(len(replayed) / len(runs))
        except ValueError as error:
            raise Complaint(str(error)) from error
        finally:
            bar.close()
        return _show(options, replayed, labels, time.monotonic() - begun)


def _show(
    options: argparse.Namespace,
    replayed: List[ReplayedRun],
    labels: Optional[Mapping[str, Label]],
    seconds: float,
) -> Tuple[int, bool]:
    from plarv_processors.engine import is_compiled
    from plarv_sinks.history_table import summarise

    replayed.sort(key=lambda run: run.run_id)
    for run in replayed:
        for line in run.told:
            tell(line)
        if run.error:
            tell(f"run {run.run_id}: {run.error}")
    rows = summarise(replayed, labels)
    if options.json:
        for run in replayed:
            sys.stdout.write(json.dumps(_run_object(run), allow_nan=False) + "\n")
        summary = {"type": "summary", **_totals(replayed), "seconds": round(seconds, 3)}
        summary["compiled"] = is_compiled()
        summary["detectors"] = [row.to_dict() for row in rows]
        sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    else:
        _print(replayed, rows, seconds)
    failed = any(run.error for run in replayed)
    differs = any(run.only_replayed or run.only_recorded for run in replayed)
    worst = max((run.worst for run in replayed), default=0)
    return worst, failed or (options.compare and differs)


def _print(replayed: Sequence[ReplayedRun], rows: Sequence[Any], seconds: float) -> None:
    from plarv_sinks.history_table import change_line, history_table

    totals = _totals(replayed)
    rate = totals["steps"] / seconds if seconds > 0 else 0.0
    sys.stdout.write(
        f"{totals['runs']:,} runs, {totals['steps']:,} steps in {seconds:,.1f} s "
        f"({rate:,.0f} steps/s)\nrecords: {totals['same_records']:,} the same, "
        f"{totals['only_replayed']:,} only in the replay, "
        f"{totals['only_recorded']:,} only recorded\n"
    )
    if not rows:
        sys.stdout.write("no alarm, live or in the replay\n")
        return
    sys.stdout.write("\n")
    for line in aligned([tuple(row) for row in history_table(rows)]):
        sys.stdout.write(line + "\n")
    changed = [
        change_line(run.run_id, change)
        for run in replayed
        for change in run.changes
        if change.kind != "same"
    ]
    if changed:
        sys.stdout.write("\n")
    for line in changed[:_SHOWN]:
        sys.stdout.write(line + "\n")
    if len(changed) > _SHOWN:
        sys.stdout.write(f"and {len(changed) - _SHOWN:,} more; --json prints all\n")


def _totals(replayed: Sequence[ReplayedRun]) -> Dict[str, Any]:
    return {
        "runs": sum(not run.error for run in replayed),
        "failed": sum(bool(run.error) for run in replayed),
        "steps": sum(run.num_steps for run in replayed),
        "same_records": sum(run.same_records for run in replayed),
        "only_replayed": sum(run.only_replayed for run in replayed),
        "only_recorded": sum(run.only_recorded for run in replayed),
    }


def _run_object(run: ReplayedRun) -> Dict[str, Any]:
    found: Dict[str, Any] = {"type": "run", **run._asdict()}
    found["changes"] = [_change_object(change) for change in run.changes]
    return found


def _change_object(change: Change) -> Dict[str, Any]:
    found: Dict[str, Any] = {"kind": change.kind, "detector": change.detector}
    found["steps"] = change.steps
    for name in ("recorded", "replayed"):
        episode = getattr(change, name)
        if episode is not None:
            found[name] = {
                "level": episode.level,
                "end_step": episode.end_step,
                "opened": episode.opened.to_dict(),
            }
    return found


def _runs(options: argparse.Namespace) -> List[str]:
    """The runs that were asked for. Complaint: the store has none of them."""
    from plarv_sinks.store import Store, StoreError

    try:
        store = Store(options.source, tell)
        rows = store.run_rows()
    except StoreError as error:
        raise Complaint(str(error)) from error
    if options.runs is not None:
        wanted = names_in(options.runs)
        missing = [run for run in wanted if run not in rows]
        if missing or not wanted:
            named = ", ".join(missing) or repr(options.runs)
            raise Complaint(f"{store.location}: no run {named}; it has {len(rows):,} runs")
        rows = {run: rows[run] for run in wanted}
    if options.since is not None:
        since_ns = _since(options.since)
        rows = {run: row for run, row in rows.items() if (row.last_time_ns or 0) >= since_ns}
    if not rows:
        since = f" since {options.since}" if options.since else ""
        raise Complaint(f"{store.location}: no run{since}")
    return list(rows)


def _since(text: str) -> int:
    """UTC nanoseconds of a date, or of so many days ago (``30d``)."""
    if text.endswith("d") and text[:-1].isdigit():
        return int((time.time() - int(text[:-1]) * _DAY_S) * 1e9)
    try:
        import calendar

        return calendar.timegm(time.strptime(text, "%Y-%m-%d")) * 10**9
    except ValueError as error:
        raise Complaint(
            f"--since is YYYY-MM-DD or a number of days as 30d, not {text!r}"
        ) from error


def _labels(path: Optional[Path]) -> Optional[Dict[str, Label]]:
    from plarv_sinks.curve import ReplayError
    from plarv_sinks.labels import read_labels

    if path is None:
        return None
    try:
        return read_labels(path)
    except ReplayError as error:
        raise Complaint(str(error)) from error


def names_in(text: Optional[str]) -> List[str]:
    """The names in a list with commas, each once; none of None."""
    names = [name.strip() for name in (text or "").split(",")]
    return list(dict.fromkeys(name for name in names if name))
