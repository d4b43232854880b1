"""Runs written into a store as sinks leave them: the folded log, and what an engine found in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from urllib.parse import quote

from plarv_processors.engine import Engine
from plarv_schemas import arrow
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_sinks.forensics import Forensics, Run, open_store
from plarv_sinks.store_files import StoreFiles, steps_place, table_path
from plarv_sinks.store_runs import RunProgress

__all__ = ["DATE", "as_dict", "keep", "kept", "steps_of"]

DATE = "2026-11-23"

_Placed = Tuple[Event, int, int]  # with ordinal and attempt


def keep(
    location: Path, events: Sequence[Event], change: Optional[Callable[[Verdict], Verdict]] = None
) -> str:
    """Writes a run's log, and its verdicts, each as ``change`` makes it; the run's id."""
    location.mkdir(parents=True, exist_ok=True)
    run_id = events[0].run_id
    engine, progress = Engine(), RunProgress(run_id)
    placed: List[_Placed] = []
    found: List[Any] = []
    for event in events:
        ordinal = progress.place(event)
        found += engine.fold(event)
        if ordinal is not None:
            placed.append((event, ordinal, progress.attempts.of(event.session)))
    files = StoreFiles(location)
    _write_events(files, run_id, placed)
    verdicts = [each if change is None else change(each) for each in found if _is(each, Verdict)]
    actions = [each for each in found if _is(each, Action)]
    tables: Any = {
        "verdicts": arrow.encode_verdicts(verdicts, schema=arrow.file_schema("verdicts")),
        "actions": arrow.encode_actions(actions, schema=arrow.file_schema("actions")),
        "runs": arrow.encode_runs([progress.row()]),
    }
    for table, batch in tables.items():
        files.write(
            f"{table_path(table, DATE)}/{run_id}.parquet", arrow.file_schema(table), [batch]
        )
    return run_id


def kept(location: Path, events: Sequence[Event], **options: Any) -> Run:
    """The same run, as forensics reads it."""
    run_id = keep(location, events, **options)
    store: Forensics = open_store(location)
    return store.run(run_id)


def steps_of(
    losses: Sequence[float], run_id: str = "run", session: str = "a", first: int = 0, **columns: Any
) -> List[Event]:
    """A session of one rank: a step a loss, a second apart, and the other columns as they are."""
    begun: List[Event] = [
        ControlEvent(run_id, session, 0, 0, "session_started", 1_700_000_000_000_000_000)
    ]
    for number, loss in enumerate(losses):
        time_ns = 1_700_000_000_000_000_000 + 1_000_000_000 * (number + 1)
        step = StepEvent(run_id, session, number + 1, 0, first + number, time_ns, loss=loss)
        begun.append(step._replace(**columns))
    return begun


def as_dict(items: Any) -> Dict[str, float]:
    """A map as the reader at hand gives it: a mapping, pairs, or records of key and value."""
    if hasattr(items, "items"):
        return dict(items.items())
    pairs = [tuple(each.values()) if isinstance(each, dict) else tuple(each) for each in items]
    return dict(pairs)


def _write_events(files: StoreFiles, run_id: str, placed: Sequence[_Placed]) -> None:
    steps = [each for each in placed if isinstance(each[0], StepEvent)]
    controls = [each for each in placed if isinstance(each[0], ControlEvent)]
    batch = arrow.encode_steps(
        [event for event, _, _ in steps if isinstance(event, StepEvent)],
        ordinals=[ordinal for _, ordinal, _ in steps],
        attempts=[attempt for _, _, attempt in steps],
        schema=arrow.file_schema("steps"),
    )
    folder, schema = steps_place(DATE, run_id)
    files.write(f"{folder}/0.parquet", schema, [batch])
    batch = arrow.encode_controls(
        [event for event, _, _ in controls if isinstance(event, ControlEvent)],
        ordinals=[ordinal for _, ordinal, _ in controls],
        attempts=[attempt for _, _, attempt in controls],
        schema=arrow.file_schema("events"),
    )
    path = f"{table_path('events', DATE)}/{quote(run_id, safe='')}.parquet"
    files.write(path, arrow.file_schema("events"), [batch])


def _is(found: Any, kind: type) -> bool:
    return isinstance(found, kind)
