"""Says how far this worker's detectors have read, into the partition of their verdicts.

A watermark covers verdicts that the broker has acknowledged: an agent's position moves after that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Callable, Dict, Tuple

from plarv_processors.worker.config import WorkerConfig
from plarv_schemas.messages import LeftOut, Watermark, watermark_message

__all__ = ["Watermarks"]

_log = logging.getLogger("plarv.worker")

_IDLE_S = 1.0
_HURRY_STEP_S = 0.002
_HURRY_STEPS = 15


class Watermarks:
    """One small record for all detectors: every 25 ms while steps flow, once a second when idle.

    After a verdict it goes out as soon as every detector has passed the verdict's message, so that
    the policy need not wait.
    """

    def __init__(
        self,
        app: Any,
        config: WorkerConfig,
        positions: Callable[[], Dict[int, Dict[str, int]]],
        notes: Callable[[int], Tuple[LeftOut, ...]],
    ) -> None:
        self._app = app
        self._topic = config.topics.verdicts
        self._pause_s = config.watermark_s
        self._positions = positions
        self._notes = notes
        self._said: Dict[int, Tuple[Dict[str, int], float]] = {}
        self._hurried: Dict[int, int] = {}  # partition -> offset of a message with a verdict
        self._wake = asyncio.Event()

    def hurry(self, partition: int, offset: int) -> None:
        """A verdict about the message at ``offset`` is out."""
        self._hurried[partition] = max(offset, self._hurried.get(partition, -1))
        self._wake.set()

    async def run(self) -> None:
        """As long as the app runs."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), self._pause_s)
            except asyncio.TimeoutError:
                pass
            self._wake.clear()
            await self._let_all_pass()
            await self._say()

    async def _let_all_pass(self) -> None:
        hurried, self._hurried = self._hurried, {}
        for _ in range(_HURRY_STEPS):
            now = self._positions()
            if all(
                min(now[partition].values()) > offset
                for partition, offset in hurried.items()
                if partition in now
            ):
                return
            await asyncio.sleep(_HURRY_STEP_S)

    async def _say(self) -> None:
        now = time.monotonic()
        for partition, positions in self._positions().items():
            before, at = self._said.get(partition, ({}, 0.0))
            if positions == before and now - at < _IDLE_S:
                continue
            message = watermark_message(Watermark(positions, self._notes(partition)))
            try:
                # Not waited for: a later one says the same and more.
                await self._app.producer.send(
                    self._topic, message.key, message.value, partition, None, dict(message.headers)
                )
            except Exception as error:  # noqa: BLE001 - the broker is away: the next one tells
                _log.debug("no watermark of partition %d: %s", partition, error)
                return
            self._said[partition] = (positions, now)
