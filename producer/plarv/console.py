"""What Argus says: one line at the start, one a verdict or action, one at the end. On stderr."""

from __future__ import annotations

import os
import sys
from typing import Union

from plarv_schemas.events import Action, Verdict

__all__ = ["Console"]

_QUIET = ("WARN", "CERTIFY")  # the verdict behind a warning says it all; the other is good news
_MAX_LINES = 200  # a broken run must not flood its own log; the files have everything
_COLOUR = {"critical": "31", "warn": "33", "ok": "32"}


class Console:
    """Lines for a person. Silent on all ranks but one a node, and where asked to be."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent
        self._lines = 0

    def say(self, text: str) -> None:
        """One line, always shown unless silent."""
        if self.silent:
            return
        try:
            over = "\r\x1b[K" if _at_terminal() else ""  # a progress bar's line: it is drawn again
            sys.stderr.write(f"{over}[argus] {text}\n")
            sys.stderr.flush()
        except UnicodeError:
            pass  # that line alone
        except Exception:  # noqa: BLE001 - stderr may be anybody's object
            self.silent = True  # nobody is there to read: stderr is closed

    def record(self, record: Union[Verdict, Action]) -> None:
        """One line for a verdict or an action; past 200 they are only in the run's folder."""
        self._lines += 1
        if self._lines > _MAX_LINES:
            if self._lines == _MAX_LINES + 1:
                self.say("further verdicts are not printed: `argus status` shows them")
            return
        if isinstance(record, Verdict):
            rank = "" if record.rank is None else f" rank {record.rank}"
            word = record.state if record.state == "resolved" else record.level
            self.say(
                f"step {record.step}{rank} {self._paint(word, record.level)} "
                f"{record.detector} ({record.kind}): {record.message}"
            )
        elif record.kind not in _QUIET:
            dry = "  (MANUAL: not applied)" if record.parameters.get("dry_run") else ""
            self.say(f"step {record.step} action {record.kind}: {record.reason}{dry}")

    def _paint(self, word: str, level: str) -> str:
        plain = "NO_COLOR" in os.environ or not _at_terminal()
        return word if plain else f"\x1b[{_COLOUR[level]}m{word}\x1b[0m"


def _at_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except Exception:  # noqa: BLE001 - stderr may be anybody's object
        return False
