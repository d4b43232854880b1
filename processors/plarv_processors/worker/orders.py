"""Operators' orders: checked, and written once into the log as control events."""

from __future__ import annotations

import logging
import time
from typing import Any, Awaitable, Callable, Dict

from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.health import Health
from plarv_processors.worker.policy_lane import PolicyLane
from plarv_schemas.events import ControlEvent, digest
from plarv_schemas.signatures import Order, run_key, verify
from plarv_schemas.topics import SIGNATURE_HEADER, header

__all__ = ["OrderDesk"]

_log = logging.getLogger("plarv.worker")

_KINDS = ("pause", "resume", "stop")
_MAX_REFUSALS = 20  # of a run that are written into its log; all are counted
_MAX_RUNS = 10_000


class OrderDesk:
    """Takes records of the orders topic. An order that was written before is a duplicate there."""

    def __init__(
        self,
        config: WorkerConfig,
        health: Health,
        write: Callable[[ControlEvent, int], Awaitable[None]],
    ) -> None:
        self._config = config
        self._health = health
        self._write = write
        self._refusals: Dict[str, int] = {}

    async def take(self, record: Any, lane: PolicyLane) -> None:
        """One record of the topic."""
        try:
            order = Order.from_bytes(record.value or b"")
        except ValueError as error:
            self._health.order("refused")
            _log.warning("an order that cannot be read was refused: %s", error)
            return
        why = self._objection(order, record, lane)
        data: Dict[str, object]
        if why:
            self._health.order("refused")
            _log.warning("run %s: order %s refused: %s", order.run_id, order.order[:40], why)
            if not self._may_write(order, record, lane):
                return
            kind, session = "action_refused", digest("refused", order.run_id, order.id, why)
            data = {"order": order.id[:64], "why": why}
        else:
            self._health.order("accepted")
            kind, session = "order", digest("order", order.run_id, order.id)
            data = {"order": order.order, "operator": order.operator, "id": order.id}
        event = ControlEvent(
            run_id=order.run_id,
            session=session,
            record=0,
            rank=None,
            kind=kind,  # type: ignore[arg-type]  # one of two literals
            time_ns=time.time_ns(),
            data=data,
        )
        await self._write(event, lane.partition)

    def _objection(self, order: Order, record: Any, lane: PolicyLane) -> str:
        """Why it is not obeyed; "" where it is."""
        if (record.key or b"") != order.run_id.encode("utf-8"):
            return "it was sent for another run"
        if not self._config.master_key:
            return "this worker holds no master key to check it with"
        key = run_key(self._config.master_key, order.run_id)
        if not verify(key, "order", record.value, header(record.headers, SIGNATURE_HEADER)):
            return "its signature is wrong"
        if order.order not in _KINDS:
            return "there is no such order"
        if time.time_ns() >= order.expires_ns:
            return "it has expired"
        entry = lane.runs.get(order.run_id)
        if order.attempt is not None and entry is not None:
            if entry.fold.attempt != order.attempt:
                return f"it is for attempt {order.attempt}, and this is {entry.fold.attempt}"
        return ""

    def _may_write(self, order: Order, record: Any, lane: PolicyLane) -> bool:
        """Whether a refusal goes into the run's log: nobody can flood it, or make up runs."""
        if order.run_id not in lane.runs or record.key != order.run_id.encode("utf-8"):
            return False
        if len(self._refusals) >= _MAX_RUNS:
            self._refusals.clear()
        count = self._refusals[order.run_id] = self._refusals.get(order.run_id, 0) + 1
        return count <= _MAX_REFUSALS
