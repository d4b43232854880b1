"""Replays a store's runs, on as many processes as one likes, beside what was recorded."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Iterator, List, NamedTuple, Sequence, Tuple

from plarv_processors.detectors import load
from plarv_processors.engine import Engine, EngineConfig, left_out_by
from plarv_schemas.events import LEVELS, Action, StepEvent, Verdict
from plarv_sinks.changes import Change, changes_of
from plarv_sinks.store import Store, StoreError

__all__ = ["History", "ReplayedRun", "replay_history", "replay_run"]


@dataclass(frozen=True)
class History:
    """What is replayed, and through which detectors; it travels to other processes."""

    location: str
    detectors: Tuple[str, ...] = ()  # package:Class of one's own, beside those of Argus
    without: Tuple[str, ...] = ()  # names
    mode: str = "MANUAL"  # of the policy, where the recording does not say

    def config(self) -> EngineConfig:
        """The engine's. ValueError: a detector does not load."""
        extra = tuple(load(path) for path in self.detectors)
        return EngineConfig(mode=self.mode, extra=extra, without=self.without)


class ReplayedRun(NamedTuple):
    """One run, replayed, beside what was recorded of it."""

    run_id: str
    num_events: int = 0
    num_steps: int = 0
    changes: Tuple[Change, ...] = ()  # of the detectors that were replayed
    same_records: int = 0  # verdicts and actions that are the same as a whole
    only_replayed: int = 0  # records, by their ids
    only_recorded: int = 0
    worst: int = 0  # index into LEVELS, of the replay
    told: Tuple[str, ...] = ()  # what could not be read, and detectors that raised
    error: str = ""  # it could not be replayed, and why


def replay_history(history: History, runs: Sequence[str], jobs: int = 1) -> Iterator[ReplayedRun]:
    """The runs, replayed, as each is done; a run that cannot be has an ``error``.

    ``jobs`` processes share the work; with one it is done here. ValueError: see History.
    """
    history.config()  # what is wrong with it is told once, and here
    if jobs <= 1 or len(runs) <= 1:
        for run_id in runs:
            yield replay_run(history, run_id)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads of pyarrow's
    with ProcessPoolExecutor(min(jobs, len(runs)), mp_context=context) as pool:
        waiting = {pool.submit(replay_run, history, run_id): run_id for run_id in runs}
        for done in as_completed(waiting):
            try:
                yield done.result()
            except BrokenProcessPool:
                why = "a process that replayed runs was killed: not enough memory, perhaps"
                yield ReplayedRun(waiting[done], error=why)


def replay_run(history: History, run_id: str) -> ReplayedRun:
    """One run of the store, replayed."""
    told: List[str] = []
    try:
        store, heard = _store(history.location)
        heard.clear()
        replayed = _replay(history, store, run_id, told)
        return replayed._replace(told=(*heard, *replayed.told))
    except (StoreError, OSError, ValueError) as error:
        return ReplayedRun(run_id, told=tuple(told), error=str(error))


@lru_cache(maxsize=1)  # what it remembers of the files serves the next run of this process
def _store(location: str) -> Tuple[Store, List[str]]:
    heard: List[str] = []
    return Store(location, heard.append), heard


def _replay(history: History, store: Store, run_id: str, told: List[str]) -> ReplayedRun:
    config = history.config()
    engine, names = Engine(config), {cls.name for cls in config.classes()}
    for control in store.controls(run_id):
        left = left_out_by(control)
        if left is not None:
            engine.leave_out(*left)
    num_events = num_steps = 0
    is_whole = True
    verdicts: List[Verdict] = []
    actions: List[Action] = []
    for ordinal, event in store.placed_events(run_id):
        is_whole = is_whole and ordinal == num_events
        num_events += 1
        num_steps += isinstance(event, StepEvent)
        for finding in engine.fold(event):
            if isinstance(finding, Verdict):
                verdicts.append(finding)
            else:
                actions.append(finding)
    told += [f"run {run_id}: detector {name} raised: {why}" for name, why in engine.faults.items()]
    if not is_whole:  # other ordinals, other attempts: what differs would mean nothing
        told.append(f"run {run_id}: events are missing in the store: it is not compared")
        return ReplayedRun(run_id, num_events, num_steps, told=tuple(told))
    recorded = [found for found in store.verdicts(run_id) if found.detector in names]
    same, ours, theirs = _by_record(verdicts, actions, recorded, store.actions(run_id))
    return ReplayedRun(
        run_id,
        num_events,
        num_steps,
        tuple(changes_of(recorded, verdicts)),
        same,
        ours,
        theirs,
        max((LEVELS.index(found.level) for found in verdicts), default=0),
        tuple(told),
    )


def _by_record(
    verdicts: Sequence[Verdict],
    actions: Sequence[Action],
    recorded: Sequence[Verdict],
    recorded_actions: Sequence[Action],
) -> Tuple[int, int, int]:
    """How many records are the same, only replayed, only recorded; by all they hold."""
    ours = {found.id: found.to_dict() for found in verdicts}
    ours.update({found.id: found.to_dict() for found in actions})
    theirs = {found.id: found.to_dict() for found in recorded}
    theirs.update({found.id: found.to_dict() for found in recorded_actions})
    same = sum(theirs.get(name) == found for name, found in ours.items())
    return same, len(ours) - same, len(theirs) - same
