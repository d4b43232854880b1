"""Where a report's run comes from: a folder of this machine, or a store."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence, Tuple, Union

from plarv_processors.engine import Engine
from plarv_processors.stored_fold import base_of, fold_rest
from plarv_schemas.events import Action, Event, Verdict
from plarv_schemas.records import read_findings
from plarv_schemas.run_log import RunLog, is_run_dir
from plarv_sinks.curve import ReplayError, Tell

__all__ = ["Recorded", "of_folder", "of_store"]

_POLL_EVENTS = 4096


class Recorded(NamedTuple):
    """All that was recorded of one run."""

    run_id: str
    events: Iterator[Event]  # in the log's order; to be read once
    verdicts: Sequence[Verdict]
    actions: Sequence[Action]
    first_ordinal: int  # of the first event
    commands: Tuple[str, ...]  # that judge the run again
    snippet: str  # that opens it in Python


def of_folder(folder: Path, tell: Tell) -> Recorded:
    """The run in a folder of this machine; what is still to be folded is folded first.

    The standard library does for it. ReplayError: no journal, or one of a newer version.
    """
    if not is_run_dir(folder):
        raise ReplayError(f"{folder}: not a run's folder: no journal in it")
    try:
        with contextlib.suppress(OSError):  # a folder that we may not write to is read as it is
            if not fold_rest(folder):
                tell(f"{folder}: it is running; what its engine has not judged yet is not in here")
    except ValueError as error:
        raise ReplayError(f"{folder}: {error}") from error
    base = base_of(folder, Engine())
    if base is not None:
        tell(f"{folder}: older events were removed; the curves begin after them")
    verdicts, actions = _split(list(read_findings(folder)))
    place = str(folder)
    return Recorded(
        run_id=folder.name,
        events=_read(folder, tell),
        verdicts=verdicts,
        actions=actions,
        first_ordinal=0 if base is None else max(0, base + 1),
        commands=(f"argus replay {_quoted(place)}", f"argus export {_quoted(place)}"),
        snippet=(
            "from pathlib import Path\n"
            "from plarv_sinks.forensics.first_cause import first_cause\n"
            "from plarv_sinks.report.source import of_folder\n\n"
            f"run = of_folder(Path({place!r}), print)\n"
            "cause = first_cause(run.events, run.verdicts, run.actions)\n"
            "print(cause.sentence)"
        ),
    )


def of_store(location: str, run_id: str, tell: Tell) -> Recorded:
    """A run in a store. ReplayError: no such store or run, or pyarrow is missing."""
    from plarv_sinks.store import Store, StoreError

    try:
        store = Store(location, tell)
        store.run_row(run_id)
        verdicts, actions = store.verdicts(run_id), store.actions(run_id)
    except (StoreError, ImportError) as error:
        raise ReplayError(str(error)) from error
    return Recorded(
        run_id=run_id,
        events=store.events(run_id),
        verdicts=verdicts,
        actions=actions,
        first_ordinal=0,
        commands=(f"argus replay --from {_quoted(location)} --runs {_quoted(run_id)}",),
        snippet=(
            "from plarv_sinks.forensics import open_store\n\n"
            f"run = open_store({location!r}).run({run_id!r})\n"
            "print(run.first_cause().sentence)\n"
            "run.timeline()  # and .steps(), .verdicts(), .explain(ID), .plot()"
        ),
    )


def _read(folder: Path, tell: Tell) -> Iterator[Event]:
    log = RunLog(folder)
    try:
        events = log.poll(_POLL_EVENTS)
        while events:
            yield from events
            events = log.poll(_POLL_EVENTS)
    except ValueError as error:
        raise ReplayError(f"{folder}: {error}") from error
    finally:
        log.close()
    if log.skipped:
        tell(f"{folder}: {log.skipped:,} records could not be read")


def _split(
    findings: Sequence[Union[Verdict, Action]],
) -> Tuple[List[Verdict], List[Action]]:
    verdicts = [finding for finding in findings if isinstance(finding, Verdict)]
    actions = [finding for finding in findings if isinstance(finding, Action)]
    verdicts.sort(key=lambda finding: finding.ordinal)
    actions.sort(key=lambda finding: finding.ordinal)
    return verdicts, actions


def _quoted(text: str) -> str:
    """As a shell takes it."""
    return shlex.quote(text)
