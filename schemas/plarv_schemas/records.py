"""The verdicts and actions beside a run's journal: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

from plarv_schemas.events import Action, ControlEvent, Verdict
from plarv_schemas.run_log import read_run

__all__ = ["ACTIONS_FILE", "FOLD_LOCK", "VERDICTS_FILE", "paused_by", "read_findings", "read_lines"]

VERDICTS_FILE = "verdicts.jsonl"
ACTIONS_FILE = "actions.jsonl"
FOLD_LOCK = "fold.lock"  # held by whoever writes these two


def read_lines(path: Path) -> Iterator[Dict[str, Any]]:
    """The objects in a file of JSON lines; none where there is no such file. OSError: unreadable.

    A line that its writer did not finish is left out, as is any other that is no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def read_findings(folder: Path) -> Iterator[Union[Verdict, Action]]:
    """The verdicts recorded in a run's folder, then its actions. OSError: unreadable.

    Lines that were cut are left out.
    """
    for file, read in ((VERDICTS_FILE, Verdict.from_dict), (ACTIONS_FILE, Action.from_dict)):
        for record in read_lines(folder / file):
            try:
                finding: Union[Verdict, Action] = read(record)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
            yield finding


def paused_by(folder: Path) -> Optional[Action]:
    """The PAUSE that holds the run in ``folder``; None: nothing does.

    One that the training processes dropped together, refused, or let expire holds nothing. Where a
    pause stands this reads the run's whole log: seconds at most.
    """
    found: List[Action] = []
    for record in read_lines(folder / ACTIONS_FILE):
        if record.get("kind") not in ("PAUSE", "RESUME"):
            continue
        try:
            found.append(Action.from_dict(record))
        except (KeyError, TypeError, ValueError):
            continue
    newest: Optional[Action] = None
    # A fleet's action may be written down late, by the next start; its ordinal says when it was.
    for action in sorted(found, key=lambda action: action.ordinal):
        if action.kind == "RESUME":
            newest = None
        elif not action.parameters.get("dry_run"):
            newest = action
    return None if newest is None or _was_void(newest, folder) else newest


def _was_void(action: Action, folder: Path) -> bool:
    try:
        return any(
            isinstance(event, ControlEvent)
            and event.kind in ("action_dropped", "action_refused", "action_expired")
            and event.data.get("action") == action.id
            for event in read_run(folder)
        )
    except (OSError, ValueError):  # no log that we can read: the pause stands
        return False
