"""Ships a session's journal to the log's topic: in order, at least once, never with a hole."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Callable, Deque, Dict, List, Optional, Sequence, Tuple

from plarv.fleet.link import Link
from plarv.fleet.packing import Packer, approximate_bytes
from plarv.fleet.positions import Position, Shipped, read_shipped, shipped_lock, write_shipped
from plarv_schemas.events import Event
from plarv_schemas.journal_reader import SessionReader, segments_of
from plarv_schemas.kafka_clients import BrokerError
from plarv_schemas.kafka_types import Sending
from plarv_schemas.locks import FileLock
from plarv_schemas.messages import Message, event_messages

__all__ = ["SessionShipper", "sessions_to_ship"]

_SAVE_EVERY_S = 0.25
_RETRY_S = 0.25  # between two tries to reach the brokers
_FIRST_READ = 16  # events; a step may hold long lists
_READ_BYTES = 256 * 1024  # of events read at once, about


class SessionShipper:
    """Ships one session; :meth:`turn` does what can be done now and never waits for an answer.

    What is acknowledged is noted in the run's folder (``shipped-SESSION``), so that another process
    goes on there. What was on its way then is sent twice, and the second copy is dropped by its
    (session, record). Memory: at most eight messages and one that is being packed.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        session: str,
        topic: str,
        link: Link,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.record = 0  # all before it are acknowledged
        self.messages = 0  # acknowledged ones
        self.errors: Dict[str, int] = {}
        self.trouble = ""  # why the brokers take nothing; "": they do
        self.at_end = False  # whether the last look found no further event
        self._folder = folder
        self._topic = topic
        self._link = link
        self._clock = clock
        self._lock = FileLock(shipped_lock(folder, session))
        self._reader = SessionReader(folder, rank, session)
        self._packer = Packer()
        self._position: Position = self._reader.position()
        self._marks: Deque[Tuple[int, Position]] = deque()  # (record, where a reader stood)
        self._sent: Deque[Tuple[int, List[Sending]]] = deque()  # (record behind it, its messages)
        self._read_limit = _FIRST_READ
        self._saved: Optional[Shipped] = None
        self._saved_at = self._retry_at = -float("inf")

    def acquire(self) -> bool:
        """Takes the session if nobody ships it, and goes on where it was left. OSError."""
        if self._lock.held:
            return True
        if not self._lock.acquire():
            return False
        self._saved = read_shipped(self._folder, self.session, self._topic)
        if self._saved is not None:
            self.record, self._position = self._saved.record, self._saved.position
        self._begin()
        return True

    @property
    def pending(self) -> bool:
        """Whether something that was read is not acknowledged yet."""
        return bool(self._sent) or self._packer.waiting > 0

    @property
    def done(self) -> bool:
        """Whether all that the journal holds by now is acknowledged."""
        return self.at_end and not self.pending

    @property
    def round_trip_s(self) -> Optional[float]:
        """The mean time to an acknowledgement."""
        return self._packer.round_trip_s

    def silent_s(self) -> float:
        """Seconds that the oldest message has waited for its acknowledgement."""
        return self._packer.oldest_s(self._clock())

    def turn(self) -> bool:
        """Takes in answers, reads, sends; whether anything was there to do.

        OSError, ValueError: the journal cannot be read.
        """
        before = (self.record, self._packer.waiting, len(self._sent))
        now = self._clock()
        try:
            self._take_answers(now)
            self._read(now)
            if now >= self._retry_at:
                self._send(now)
        except BrokerError as error:
            self._start_again(error, now)
        if now - self._saved_at >= _SAVE_EVERY_S:
            self.save()
        return before != (self.record, self._packer.waiting, len(self._sent))

    def save(self) -> None:
        """Notes how far the session is shipped; where the disk takes none, that is counted."""
        self._saved_at = self._clock()
        shipped = Shipped(self._topic, self.record, self._position)
        if shipped == self._saved or not self._lock.held:
            return
        try:
            write_shipped(self._folder, self.session, shipped)
            self._saved = shipped
        except OSError as error:
            self._count(f"no note of what is shipped: {error.strerror}")

    def close(self) -> None:
        """Notes how far it came, and lets go of the session."""
        self.save()
        self._reader.close()
        self._lock.release()

    def _begin(self) -> None:
        """Reads from the acknowledged position on, or where the journal begins by now."""
        self.at_end = False
        self._packer.clear()
        self._marks.clear()
        self._sent.clear()
        files = segments_of(self._folder).get(self.session, [])
        if files and files[0].segment > self._position[0]:  # shipped segments were removed
            self._position = (files[0].segment, 0, 0, *self._position[3:])
        self._reader.seek(self._position)

    def _start_again(self, error: BrokerError, now: float) -> None:
        self.trouble = str(error)
        self._link.close()
        self._begin()
        self._retry_at = now + _RETRY_S

    def _read(self, now: float) -> None:
        while self._packer.room > 0:
            events = self._reader.read(min(self._packer.room, self._read_limit))
            self.at_end = not events
            if not events:
                return
            size = 0
            for event in events:
                if event.record >= self.record:
                    self._packer.add(event, now)
                    size += approximate_bytes(event)
            self._marks.append((self._reader.record, self._reader.position()))
            grown = 2 * self._read_limit if size < _READ_BYTES else self._read_limit // 2
            self._read_limit = max(1, min(grown, self._packer.limits.events))

    def _send(self, now: float) -> None:
        events = self._packer.take(now)
        while events:
            sendings = [self._link.send(self._topic, each) for each in self._messages(events)]
            self._sent.append((events[-1].record + 1, sendings))
            events = self._packer.take(now)

    def _messages(self, events: Sequence[Event]) -> List[Message]:
        try:
            return event_messages(events)
        except (ValueError, OverflowError) as error:  # one that no batch can hold
            if len(events) == 1:
                self._count(f"an event that cannot be sent: {type(error).__name__}")
                return []
            return [message for event in events for message in self._messages([event])]

    def _take_answers(self, now: float) -> None:
        while self._sent and all(sending.is_done for sending in self._sent[0][1]):
            record, sendings = self._sent[0]
            for sending in sendings:
                error = self._link.error_of(sending)
                if error is not None:
                    self._refused(sending)
                    raise error
            self._sent.popleft()
            self._packer.acknowledged(now)
            self.messages += len(sendings)
            self.record = record
            self.trouble = ""
            while self._marks and self._marks[0][0] <= record:
                self._position = self._marks.popleft()[1]

    def _refused(self, sending: Sending) -> None:
        """Smaller messages, where the brokers take none of this size."""
        if type(sending.exception).__name__ == "MessageSizeTooLargeError":
            limits = self._packer.limits
            self._packer.limits = limits._replace(
                events=max(1, limits.events // 2), size_bytes=max(1024, limits.size_bytes // 2)
            )

    def _count(self, cause: str) -> None:
        self.errors[cause] = self.errors.get(cause, 0) + 1


def sessions_to_ship(folder: Path) -> List[Tuple[int, str]]:
    """(rank, session) of the training processes with a journal in the folder, the oldest first.

    An operator's local orders are left out: a fleet's are signed and go another way.
    """
    found: List[Tuple[int, int, str]] = []
    for session, files in segments_of(folder).items():
        if files[0].rank >= 0:
            reader = SessionReader(folder, files[0].rank, session, files[0].segment)
            try:
                found.append((reader.started_ns(), files[0].rank, session))
            except (OSError, ValueError):  # shipping it says why
                found.append((0, files[0].rank, session))
            finally:
                reader.close()
    return [(rank, session) for _, rank, session in sorted(found)]
