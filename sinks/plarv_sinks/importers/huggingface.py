"""Reads the ``trainer_state.json`` of a Hugging Face ``Trainer``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, cast

from plarv_sinks.curve import ReplayError, Tell
from plarv_sinks.importers.recorded import RecordedRun, RowCurve

__all__ = ["recognises", "runs"]

_FILE = "trainer_state.json"
_HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_CHECKPOINT = re.compile(r"checkpoint-(\d+)\Z")
_CONFIG = (
    "num_train_epochs", "max_steps", "logging_steps", "eval_steps", "save_steps",
    "train_batch_size", "total_flos", "trial_name", "trial_params",
)  # fmt: skip


class _State(NamedTuple):
    path: Path
    rows: List[Mapping[str, object]]
    fields: Mapping[str, Any]  # the others; empty where the file is cut
    is_whole: bool


def recognises(path: Path, head: bytes) -> bool:
    """A trainer's state, or a folder that holds one, or whose checkpoints or folders do."""
    if path.is_dir():
        return bool(_folders(path))
    text = head.decode("utf-8-sig", "replace").lstrip()
    return text.startswith("{") and _HISTORY.search(text) is not None


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """The run of a file or an output folder, or of each output folder in a folder.

    Of an output folder the state with the longest history is read: its own, or that of its last
    checkpoint. The row that sums up the training is no step and is left out.
    """
    if not path.is_dir():
        yield _run(path, _read(path), tell)
        return
    for folder in _folders(path):
        state = _longest(_states(folder))
        if state is not None:
            yield _run(state.path, state, tell)


def _run(path: Path, state: _State, tell: Tell) -> RecordedRun:
    if not state.is_whole:
        tell(f"{path}: cut in the middle; read the {len(state.rows):,} entries before the cut")
    rows = [row for row in state.rows if "train_runtime" not in row]
    last, end = state.fields.get("global_step"), state.fields.get("max_steps")
    done = len(rows) < len(state.rows) or (
        isinstance(last, int) and isinstance(end, int) and 0 < end <= last
    )
    return RecordedRun(
        path,
        _name(path),
        lambda _: RowCurve(str(path), rows),
        config={name: state.fields[name] for name in _CONFIG if state.fields.get(name) is not None},
        status="completed" if done else "",
    )


def _name(path: Path) -> str:
    """Of the output folder; of a file under another name, its own."""
    if path.name != _FILE:
        return path.stem
    folder = path.resolve().parent
    return (folder.parent if _CHECKPOINT.match(folder.name) else folder).name or path.stem


def _folders(path: Path) -> List[Path]:
    if _states(path):
        return [path]
    return [each for each in sorted(path.iterdir()) if each.is_dir() and _states(each)]


def _states(folder: Path) -> List[Path]:
    """The folder's own state, then its checkpoints', the last one first."""
    numbered: Dict[int, Path] = {}
    for each in folder.glob("checkpoint-*"):
        found = _CHECKPOINT.match(each.name)
        if found and (each / _FILE).is_file():
            numbered[int(found.group(1))] = each / _FILE
    own = [folder / _FILE] if (folder / _FILE).is_file() else []
    return own + [numbered[number] for number in sorted(numbered, reverse=True)]


def _longest(paths: List[Path]) -> Optional[_State]:
    """Its own state may be of an earlier training, and the last checkpoint may be cut."""
    best: Optional[_State] = None
    broken: Optional[ReplayError] = None
    for path in paths:
        try:
            state = _read(path)
        except ReplayError as error:
            broken = error
            continue
        if best is None or len(state.rows) > len(best.rows):
            best = state
        if state.is_whole and _CHECKPOINT.match(path.parent.name):
            break
    if best is None and broken is not None:
        raise broken
    return best


def _read(path: Path) -> _State:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        fields: Any = json.loads(text)
        is_whole = isinstance(fields, dict)
    except (ValueError, RecursionError):
        fields, is_whole = {}, False
    entries: Any = fields.pop("log_history", None) if is_whole else _entries(text)
    if not isinstance(entries, list):
        raise ReplayError(f"{path}: no trainer's state: it has no log_history")
    rows = [
        cast(Mapping[str, object], row)
        for row in cast(List[object], entries)
        if isinstance(row, dict)
    ]
    return _State(path, rows, fields, is_whole)


def _entries(text: str) -> Optional[List[object]]:
    """The entries of a history before the place where the text is cut."""
    found = _HISTORY.search(text)
    if found is None:
        return None
    entries: List[object] = []
    decoder, place = json.JSONDecoder(), found.end()
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        try:
            entry, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return entries
        entries.append(entry)
