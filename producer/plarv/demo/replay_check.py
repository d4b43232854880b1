"""Live equals replay: the run's own journal, judged again by a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE, read_lines

__all__ = ["ReplayCheck", "check_replay", "first_difference"]

Record = Dict[str, Any]


class ReplayCheck(NamedTuple):
    """The live records, and how the replayed ones differ from them: "" if in nothing."""

    verdicts: List[Record]
    actions: List[Record]
    difference: str

    @property
    def identical(self) -> bool:
        """Whether every field of every record is the same, and their order."""
        return not self.difference


def check_replay(run_dir: Path, least_verdicts: int = 3, least_actions: int = 1) -> ReplayCheck:
    """Replays ``run_dir`` in a fresh process with another hash seed; compares whole records.

    Fewer records than the least asked for is a difference as well: nothing would be shown by it.
    """
    verdicts = list(read_lines(run_dir / VERDICTS_FILE))
    actions = list(read_lines(run_dir / ACTIONS_FILE))
    done = subprocess.run(
        [sys.executable, "-m", "plarv", "replay", str(run_dir), "--json"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "1",
        },
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return ReplayCheck(verdicts, actions, f"the replay ended with {done.returncode}: {last}")
    replayed: List[Record] = [json.loads(line) for line in done.stdout.splitlines()]
    difference = (
        first_difference("verdict", verdicts, [r for r in replayed if r["type"] == "verdict"])
        or first_difference("action", actions, [r for r in replayed if r["type"] == "action"])
        or _too_few("verdicts", verdicts, least_verdicts)
        or _too_few("actions", actions, least_actions)
    )
    return ReplayCheck(verdicts, actions, difference)


def first_difference(
    noun: str, live: Sequence[Mapping[str, Any]], replayed: Sequence[Mapping[str, Any]]
) -> str:
    """The first thing in which two lists of records differ, as a sentence; "" if they are equal.

    >>> first_difference("verdict", [{"step": 3}], [{"step": 4}])
    'verdict 1 of 1: step was 3 live and is 4 in the replay'
    """
    for number, (one, other) in enumerate(zip(live, replayed), 1):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name) or (name in one) != (name in other):
                return (
                    f"{noun} {number} of {len(live)}: {name} was {one.get(name)!r} live "
                    f"and is {other.get(name)!r} in the replay"
                )
    if len(live) != len(replayed):
        return f"{len(live)} {noun}s live, {len(replayed)} in the replay"
    return ""


def _too_few(noun: str, records: Sequence[Record], least: int) -> str:
    if len(records) >= least:
        return ""
    return f"only {len(records)} {noun} to compare, {least} at least were expected"
