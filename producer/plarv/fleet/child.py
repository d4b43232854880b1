"""The process beside a training process that speaks to the brokers.

``python -m plarv.fleet.child`` ships the run's journal and reads its verdicts and actions back, so
that the training loop shares its interpreter with no Kafka client. stdin: a line of configuration,
later lines are commands; its end means that the training process is gone. stdout: one JSON object a
line, for the training process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Optional, Union

from plarv.fleet.link import Link
from plarv.fleet.shipper import SessionShipper, sessions_to_ship
from plarv.fleet.subscription import Subscriber, Subscription
from plarv_schemas.events import Action, Verdict
from plarv_schemas.kafka_clients import BrokerError, RefusedError, quiet_kafka_log
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.pyarrow_types import leave_pandas_out
from plarv_schemas.topics import Topics

__all__ = ["MAX_REFUSALS", "Child", "main"]

MAX_REFUSALS = 100  # of one session that are told, and written into its log; the rest is counted

_NICENESS = 5  # the training loop goes first
_REACH_S = 3.0
_AGAIN_S = 0.5  # between two tries to reach the brokers
_PAUSE_S = 0.005  # between two looks at the journal while steps flow ...
_IDLE_PAUSE_S = 0.05  # ... and when none has come ...
_IDLE_AFTER_S = 2.0  # ... for so long
_TROUBLE_S = 3.0  # without an acknowledgement, and it is said
_ALONE_S = 10.0  # to ship what is left, once the training process is gone
_LAST_WORDS_S = 0.7  # for the verdicts on the last steps, once all is shipped
_COUNTS_EVERY_S = 1.0
_MAX_LINES = 10_000  # that wait for the training process; past that it learns no more
_LEFT_OVER_EVERY_S = 10.0  # another process may end before it has shipped all

Record = Union[Verdict, Action]


class Child:
    """Ships, subscribes, and tells the training process what happens."""

    def __init__(self, config: Dict[str, Any], tell: Callable[[Dict[str, Any]], None]) -> None:
        self._tell = tell
        self._folder = Path(config["folder"])
        self._session, self._rank = str(config["session"]), int(config["rank"])
        self._leftovers = bool(config["leftovers"])  # whether earlier sessions are shipped here too
        self._topics = Topics(config["prefix"])
        brokers = tuple(str(address) for address in config["connection"].pop("brokers"))
        connection = Connection(brokers, **config["connection"])
        key = config["key"]
        self._wake = threading.Event()
        self._link = Link(connection, self._wake.set)
        self._own = self._shipper(self._rank, self._session)
        self._subscription = Subscription(
            Subscriber(
                run_id=str(config["run_id"]),
                session=self._session,
                folder=self._folder,
                key=bytes.fromhex(key) if key else None,
                only_informs=bool(config["only_informs"]),
                begin=config["begin"],
            ),
            connection,
            self._topics,
            self._deliver,
            self._refuse,
            lambda offsets: tell({"next": offsets}),
        )
        self._refused = 0
        self._only_counted: Counter[str] = (
            Counter()
        )  # why -> refusals that were not told one by one
        self._counted_at = time.monotonic()
        self._until = float("inf")
        self._asked_to_finish = threading.Event()
        self._parent = os.getppid()
        self._stop = threading.Event()  # of the subscription's thread
        self._troubled_at: Optional[int] = None  # the record that had come last

    def run(self) -> None:
        """Reaches the brokers, then ships until the training process has ended."""
        # pyarrow is loaded before the handshake: a short run must not end before it is.
        leave_pandas_out()
        self._acquire(self._own)  # so that no other process takes it for left over
        if self._reach():
            thread = threading.Thread(target=self._subscribe, name="subscription", daemon=True)
            thread.start()
            self._ship_all()
            self._tell({"finished": {"record": self._own.record, "done": self._own.done}})
            if self._own.done:
                self._stop.wait(min(_LAST_WORDS_S, max(0.0, self._left_s())))
            self._stop.set()
            thread.join(1.0)
        else:
            self._tell({"finished": {"record": self._own.record, "done": False}})
        self._own.close()

    def command(self, line: str) -> None:
        """A line from the training process; "" where it is gone."""
        if not line:  # otherwise it waits for us as long as it can
            self._until = min(self._until, time.monotonic() + _ALONE_S)
        self._asked_to_finish.set()
        self._wake.set()

    def _reach(self) -> bool:
        """Waits for the brokers; whether they were reached before the end."""
        while self._left_s() > 0:
            try:
                self._link.open(_REACH_S)
                self._subscription.open(_REACH_S)
            except RefusedError as error:
                self._tell({"state": "refused", "why": str(error)})
                pause = 10 * _AGAIN_S
            except BrokerError as error:
                self._tell({"state": "unreachable", "why": str(error)})
                pause = _AGAIN_S
            else:
                self._tell({"state": "ready"})
                return True
            self._stop.wait(min(pause, max(0.0, self._left_s())))
        return False

    def _ship_all(self) -> None:
        """What earlier sessions left, then this one's, until all is acknowledged or time is up."""
        waiting = self._left_over()
        busy_at = looked_at = time.monotonic()
        while self._left_s() > 0:
            shipper = waiting[0] if waiting else self._own
            self._wake.clear()
            is_busy = self._turn(shipper)
            self._say_if_troubled(shipper)
            now = time.monotonic()
            if is_busy:
                busy_at = now
            elif shipper is not self._own and (shipper.done or shipper.errors):
                waiting.popleft().close()
            elif shipper.done and self._asked_to_finish.is_set():
                return
            else:
                idle = now - busy_at > _IDLE_AFTER_S and not shipper.pending
                self._wake.wait(_IDLE_PAUSE_S if idle else _PAUSE_S)
            if now - looked_at > _LEFT_OVER_EVERY_S and not waiting:
                looked_at = now
                waiting = self._left_over()

    def _turn(self, shipper: SessionShipper) -> bool:
        """Whether there was anything to do."""
        try:
            return self._acquire(shipper) and shipper.turn()
        except (OSError, ValueError) as error:
            why = f"shipping {shipper.session}: {error}"
            shipper.errors[why] = 1
            self._tell({"fault": why})
            self._stop.wait(_AGAIN_S)
            return False

    def _acquire(self, shipper: SessionShipper) -> bool:
        try:
            return shipper.acquire()
        except OSError as error:
            self._tell({"fault": f"shipping {shipper.session}: {error}"})
            return False

    def _left_over(self) -> Deque[SessionShipper]:
        """Shippers of sessions that ended before they were shipped, and that nobody ships."""
        found: Deque[SessionShipper] = deque()
        if not self._leftovers:
            return found
        for rank, session in sessions_to_ship(self._folder):
            if session != self._session:
                shipper = self._shipper(rank, session)
                if self._acquire(shipper):
                    found.append(shipper)
        return found

    def _shipper(self, rank: int, session: str) -> SessionShipper:
        return SessionShipper(self._folder, rank, session, self._topics.steps, self._link)

    def _say_if_troubled(self, shipper: SessionShipper) -> None:
        """One line when the brokers stop to answer, one when they do again."""
        silent = shipper.silent_s()
        if shipper.trouble or silent > _TROUBLE_S:
            if self._troubled_at is None:
                self._troubled_at = shipper.record
                why = shipper.trouble or f"no acknowledgement for {silent:.0f} s"
                self._tell({"trouble": why})
        elif self._troubled_at is not None and shipper.record > self._troubled_at:
            self._troubled_at = None
            self._tell({"trouble": ""})

    def _subscribe(self) -> None:
        while not self._stop.is_set():
            try:
                self._subscription.poll()
                self._tell_counts()
            except BrokerError as error:
                if isinstance(error, RefusedError):
                    self._tell({"fault": f"subscription: {error}"})
                self._stop.wait(_AGAIN_S)
            except Exception as error:  # noqa: BLE001 - our own fault: told, and it goes on
                self._tell({"fault": f"subscription: {error!r}"})
                self._stop.wait(_AGAIN_S)
        self._subscription.close()
        self._tell_counts(at_once=True)

    def _deliver(self, record: Record, binding: bool) -> None:
        self._tell({"record": record.to_dict(), "binding": binding})

    def _refuse(self, name: str, why: str) -> None:
        """The first hundred one by one; of a flood only how many: the loop must not feel it."""
        self._refused += 1
        if self._refused <= MAX_REFUSALS:
            self._tell({"refused": {"action": name, "why": why}})
        else:
            self._only_counted[why] += 1

    def _tell_counts(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._only_counted and (at_once or now - self._counted_at >= _COUNTS_EVERY_S):
            self._counted_at = now
            self._tell({"refusals": dict(self._only_counted)})
            self._only_counted.clear()

    def _left_s(self) -> float:
        """Seconds until it must end. It looks for its parent too: a pipe may outlive it."""
        now = time.monotonic()
        if self._until == float("inf") and os.getppid() != self._parent:
            self.command("")
        return self._until - now


class _Voice:
    """Writes lines to the training process on a thread: it may be slow to read, or stopped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[Optional[bytes]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="voice", daemon=True)
        self._thread.start()

    def tell(self, line: Dict[str, Any]) -> None:
        if self._lines.qsize() < _MAX_LINES:  # it was stopped: what counts is in the run's folder
            self._lines.put(json.dumps(line, separators=(",", ":")).encode("utf-8") + b"\n")

    def close(self) -> None:
        """Waits a moment until all is read."""
        self._lines.put(None)
        self._thread.join(0.5)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if line is None:
                return
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:  # nobody reads any more: what counts is in the run's folder
                continue


def main() -> None:
    """Runs until the training process ends, or 10 s longer where something is left to ship."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the training process, which may go on
    os.nice(_NICENESS)
    # What others print must not get between the lines.
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    voice = _Voice(answers)
    quiet_kafka_log()
    try:
        first = sys.stdin.readline()
        if first:
            child = Child(json.loads(first), voice.tell)
            threading.Thread(target=_listen, args=(child,), name="commands", daemon=True).start()
            child.run()
    except Exception:  # noqa: BLE001 - its last words
        voice.tell({"fault": traceback.format_exc(limit=-3)})
    voice.close()
    os._exit(0)  # a client's threads may wait for a broker that does not answer


def _listen(child: Child) -> None:
    for line in sys.stdin:
        child.command(line)
    child.command("")


if __name__ == "__main__":
    main()
