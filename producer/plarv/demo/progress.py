"""A progress bar on stderr: one line redrawn at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import time
from typing import TextIO

__all__ = ["ProgressBar"]

_WIDTH = 24
_REDRAW_S = 0.1
_LINE_S = 10.0


class ProgressBar:
    """How far a run is, its loss and its learning rate. O(1) a step; draws ten times a second.

    A line of Argus wipes the bar's line; the bar reappears below it.
    """

    def __init__(self, stream: TextIO, label: str, steps: int, ordinary_rate: float) -> None:
        self._stream = stream
        self._label = label
        self._steps = steps
        self._ordinary_rate = ordinary_rate
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and "NO_COLOR" not in os.environ
        blocks = (stream.encoding or "").lower().replace("-", "") == "utf8"
        self._full, self._empty = ("█", "░") if blocks else ("#", ".")
        self._drawn = 0.0 if self._live else float("inf")  # inf: not begun

    def step(self, step: int, loss: float, rate: float) -> None:
        """Redraws the bar if it is time to."""
        now = time.monotonic()
        self._drawn = min(self._drawn, now)
        if now - self._drawn >= (_REDRAW_S if self._live else _LINE_S):
            self._drawn = now
            self._draw(step + 1, loss, rate)

    def finish(self, steps: int, loss: float, rate: float) -> None:
        """Draws the last state and leaves it standing."""
        self._draw(steps, loss, rate)
        if self._live:
            self._put("\n")

    def _draw(self, done: int, loss: float, rate: float) -> None:
        full = min(_WIDTH, done * _WIDTH // max(1, self._steps))
        bar = self._full * full + self._empty * (_WIDTH - full)
        injured = rate > 2.0 * self._ordinary_rate
        lr = f"lr {rate:.2g}"
        if injured:
            lr = f"\x1b[31m{lr}\x1b[0m" if self._colour else f"{lr} (!)"
        line = f"{self._label:<12} {bar} {done:4d}/{self._steps}  loss {loss:<8.4g} {lr}"
        self._put(f"\r\x1b[K{line}" if self._live else line + "\n")

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody is there to look
