"""Verdicts and actions as a table for people."""

from __future__ import annotations

import os
from typing import Iterator, List, Sequence, TextIO, Tuple

from plarv_schemas.events import Action, Verdict
from plarv_sinks.replay import Finding, RunSummary

__all__ = ["action_line", "duration_text", "findings_table", "summary_line", "wants_colour"]

_COLOURS = {"ok": "32", "warn": "33", "critical": "1;31", "=>": "1;36"}
_Row = Tuple[str, ...]


def findings_table(findings: Sequence[Finding], *, colour: bool = False) -> Iterator[str]:
    """A header and one line a finding, aligned; actions stand behind ``=>``. Nothing for none.

    The attempt is shown where there was more than one. Control characters are shown as ``?``.

    >>> from plarv_schemas.events import Action, Verdict
    >>> found = Verdict("run", 1, None, 60, 60, "loss_spike", "transient", "warn", "opened", 60,
    ...                 9.0, 8.0, {}, "loss 9 is 9.0 sigma above its median 2", "loss_spike-1")
    >>> for line in findings_table([found]):
    ...     print(line)
    step  level  finding               rank  message
      60  warn   loss_spike/transient        loss 9 is 9.0 sigma above its median 2
    """
    if not findings:
        return
    attempts = ("attempt",) if any(finding.attempt > 1 for finding in findings) else ()
    rows: List[_Row] = [("step", *attempts, "level", "finding", "rank", "message")]
    rows += [_row(finding, bool(attempts)) for finding in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for number, row in enumerate(rows):
        yield _line(row, widths, 1 + len(attempts) if colour and number else -1)


def action_line(action: Action) -> str:
    """One action in one line, for a list that grows.

    >>> asked = Action("run", 1, (), 60, 60, "PAUSE", {"dry_run": True}, "jo ordered pause", (),
    ...                0.0, 260)
    >>> action_line(asked)
    '      60  =>  PAUSE  jo ordered pause (MANUAL: not applied)'
    """
    step, arrow, kind, _, reason = _row(action, False)
    return f"{step:>8}  {arrow}  {kind}  {reason}"


def summary_line(summary: RunSummary) -> str:
    """What a replay went through, in one line.

    >>> summary_line(RunSummary("run"))
    'run: 0 steps, 0 verdicts, 0 actions'
    """
    text = (
        f"{_printable(summary.run_id)}: {_count(summary.num_steps, 'step')}, "
        f"{_count(summary.num_verdicts, 'verdict')}, {_count(summary.num_actions, 'action')}"
    )
    duration = summary.duration_s
    return text if duration is None else f"{text}, run of {duration_text(duration)}"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units.

    >>> [duration_text(each) for each in (0.25, 12.0, 754.0, 18720.0, 273600.0)]
    ['0.2 s', '12.0 s', '12 min 34 s', '5 h 12 min', '3 d 4 h']
    """
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60)):
        if whole < size * (60 if large == "min" else 48):
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and nobody asked for none (NO_COLOR)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def _row(finding: Finding, with_attempt: bool) -> _Row:
    place = [str(finding.step)] + ([str(finding.attempt)] if with_attempt else [])
    if isinstance(finding, Verdict):
        rank = "" if finding.rank is None else str(finding.rank)
        what = f"{finding.detector}/{finding.kind}"
        return (*place, finding.level, _printable(what), rank, _printable(finding.message))
    # The verdict behind a warning stands right above it, with its numbers.
    reason = finding.reason.partition(":")[0] if finding.kind == "WARN" else finding.reason
    if finding.parameters.get("dry_run"):
        reason += " (MANUAL: not applied)"
    return (*place, "=>", finding.kind, "", _printable(reason))


def _line(row: _Row, widths: Sequence[int], coloured: int) -> str:
    """The row with the cell number `coloured` in its colour; -1: none."""
    cells: List[str] = []
    for column, width in enumerate(widths):
        cell = row[column].rjust(width) if column == 0 else row[column].ljust(width)
        code = _COLOURS.get(row[column]) if column == coloured else None
        cells.append(f"\x1b[{code}m{cell}\x1b[0m" if code else cell)
    return "  ".join((*cells, row[-1])).rstrip()


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
