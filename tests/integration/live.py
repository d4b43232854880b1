"""Live runs: real Argus objects, a rank each, fed from the streams of tests/processors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import pytest
from tests.processors.streams import FAULTY, HEALTHY

from plarv import Argus, ArgusIntervention
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, SCALAR_COLUMNS, StepEvent

__all__ = ["LiveRun", "stream"]

_GIVEN = [name for name in SCALAR_COLUMNS if name not in ("time_ns", "world_size", "step_time_ms")]
_GIVEN += [name for name in StepEvent._fields if name.startswith("sample_")]
_LIMIT_S = 60.0


def stream(name: str, steps: int = 700, seed: int = 0) -> List[StepEvent]:
    """The steps of the healthy or faulty stream of this name."""
    make: Any = HEALTHY.get(name) or FAULTY[name][1]
    events: List[StepEvent] = make(steps=steps, seed=seed)
    return events


class LiveRun:
    """One attempt of a run in this process: an Argus for each rank, all in one folder."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        run_id: str = "run",
        ranks: int = 1,
        mode: str = "MANUAL",
        *,
        first_rank: int = 0,
        world_size: int = 0,
        behind_ns: int = 0,
        leads: bool = True,
        **arguments: Any,
    ) -> None:
        """``first_rank`` and ``world_size``: where other nodes have ranks too.

        ``behind_ns``: the clocks of all ranks but the first are behind by so much, so that what
        comes later was earlier. Without ``leads`` no rank folds: the test does.
        """
        clock_ns = time.time_ns
        self.ranks: List[Argus] = []
        self.paused = False
        for rank in range(ranks):
            with patch.context() as environment:
                if ranks > 1 or not leads:
                    environment.setenv("RANK", str(first_rank + rank))
                    environment.setenv("LOCAL_RANK", str(rank if leads else rank + 1))
                    environment.setenv("WORLD_SIZE", str(world_size or ranks))
                    environment.setenv("LOCAL_WORLD_SIZE", str(ranks))
                if rank > 0:
                    environment.setattr(time, "time_ns", lambda: clock_ns() - behind_ns)
                arguments.setdefault("silent", True)
                self.ranks.append(Argus(run_id=run_id, mode=mode, **arguments))

    @property
    def folder(self) -> Path:
        folder = self.ranks[0].run_dir
        assert folder is not None
        return folder

    def feed(self, events: Sequence[StepEvent]) -> None:
        """Steps, each on all ranks; with several ranks each takes its own part of a joined one."""
        for event in events:
            parts = event.parts or (event,) * len(self.ranks)
            for rank, part in zip(self.ranks, parts):
                self.step(rank, part)

    def step(self, rank: Argus, event: StepEvent) -> None:
        """One step of one rank. An intervention is noted, and training goes on all the same."""
        given = {name: getattr(event, name) for name in _GIVEN if getattr(event, name) is not None}
        loss, grad_norm = given.pop("loss", None), given.pop("grad_norm", None)
        try:
            rank.step(loss, grad_norm, step=event.step, local_report=_report(event), **given)
        except ArgusIntervention:
            self.paused = True

    def catch_up(self) -> None:
        """Waits until the engine has folded all that the ranks have written."""
        until = time.monotonic() + _LIMIT_S
        while not self._caught_up():
            assert time.monotonic() < until, f"stands at {self.ranks[0].decision.step}"
            time.sleep(0.002)

    def _caught_up(self) -> bool:
        fold: Any = self.ranks[0]._session.transport._fold  # type: ignore[union-attr]
        if fold is None:
            return False
        readers, settled = dict(fold._log._readers), fold._log.settled
        writers: List[Any] = [rank._writer for rank in self.ranks]
        return settled and all(
            writer.session in readers and readers[writer.session].record >= writer.record
            for writer in writers
        )

    def complete(self) -> None:
        """Followers first: the leader folds what they leave."""
        for rank in reversed(self.ranks):
            rank.complete()


def _report(event: StepEvent) -> Optional[Dict[str, Any]]:
    if event.local_levels is None:
        return None
    scores = event.local_scores or (0.0,) * len(LOCAL_CHECKS)
    return {
        "checks": {
            name: {"level": LEVELS[level], "score": score}
            for name, level, score in zip(LOCAL_CHECKS, event.local_levels, scores)
        },
        "top_affected_layers": event.local_layers or (),
    }
