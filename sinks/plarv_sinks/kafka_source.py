"""Reads recorded runs back from a fleet's topics: their events, and what was found in them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import (
    Callable,
    Dict,
    Generator,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from plarv_processors.detectors import registered
from plarv_processors.engine import Engine, EngineConfig, left_out_by
from plarv_processors.event_batch import EventBatch
from plarv_processors.worker.decoding import Decoder
from plarv_schemas.events import Action, Event, Verdict
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.messages import decode_action, decode_verdict
from plarv_schemas.topic_reader import Record, TopicRange, TopicReader, open_topic
from plarv_schemas.topics import ID_HEADER, TABLE_HEADER, Topics, header

__all__ = ["Difference", "FleetLog", "RecordedFindings", "compare", "open_log", "read_findings"]

Finding = Union[Verdict, Action]
Tell = Callable[[str], None]
LeftOut = Dict[str, Dict[str, int]]  # run -> detector -> last ordinal that it was called for


class FleetLog:
    """The log of a fleet as far as it reached when it was opened; see :func:`open_log`."""

    def __init__(self, reader: TopicReader, runs: Optional[Sequence[str]], tell: Tell) -> None:
        self._reader = reader
        self._runs = None if runs is None else frozenset(runs)
        self._tell = tell
        self.left_out: LeftOut = {}
        self.found: Set[str] = set()  # runs of which an event was read
        self.poison = 0  # messages that could not be read
        wanted = None if runs is None else sorted({reader.partition_of(run) for run in runs})
        self._ranges = reader.ranges(wanted)

    def partitions(self) -> List[int]:
        """Those in which the runs lie."""
        return sorted(self._ranges)

    def events(self, partition: int) -> Iterator[Event]:
        """The runs' events in this partition, in the log's order, runs interleaved.

        Before the first one, ``left_out`` says which detectors the fleet left out of these runs:
        the partition is read twice. Messages that cannot be read are dropped and counted, as the
        workers do. BrokerError.
        """
        span = self._ranges[partition]
        decoder = Decoder()
        for record in self._records(partition, span):
            if header(record.headers, TABLE_HEADER) == "events":
                batch = decoder.decode(record)
                if isinstance(batch, EventBatch):
                    self._note_left_out(batch.events)
        decoder = Decoder()
        for record in self._records(partition, span):
            batch = decoder.decode(record)
            if not isinstance(batch, EventBatch):
                self.poison += 1
                continue
            if batch.run_id not in self.found:
                self._begin(batch, span)
            yield from batch.events

    def engine_for(self, run_id: str, config: EngineConfig) -> Engine:
        """An engine that calls each detector no longer than the fleet did."""
        engine = Engine(config)
        for detector, ordinal in self.left_out.get(run_id, {}).items():
            engine.leave_out(detector, ordinal)
        return engine

    def _records(self, partition: int, span: TopicRange) -> Iterator[Record]:
        for record in self._reader.read({partition: span}):
            if self._runs is None or (record.key or b"").decode("utf-8", "replace") in self._runs:
                yield record

    def _note_left_out(self, events: Sequence[Event]) -> None:
        for event in events:
            found = left_out_by(event)
            if found is not None:
                detector, ordinal = found
                of_run = self.left_out.setdefault(event.run_id, {})
                of_run[detector] = min(ordinal, of_run.get(detector, ordinal))

    def _begin(self, batch: EventBatch, span: TopicRange) -> None:
        self.found.add(batch.run_id)
        first = batch.events[0].record
        if first > 0 and span.begin > 0:
            self._tell(
                f"run {batch.run_id}: {self._reader.topic} no longer holds its beginning: the "
                f"replay begins at record {first:,} of a session, and its ordinals are others"
            )


@contextmanager
def open_log(
    connection: Connection, topics: Topics, runs: Optional[Sequence[str]], tell: Tell
) -> Generator[FleetLog, None, None]:
    """The log of these runs (None: of all), as far as it reaches now. BrokerError."""
    with open_topic(connection, topics.steps) as reader:
        yield FleetLog(reader, runs, tell)


class RecordedFindings(NamedTuple):
    """What the fleet found in one run, each id once, in the order in which a replay finds it."""

    verdicts: Tuple[Verdict, ...] = ()
    actions: Tuple[Action, ...] = ()
    copies: int = 0  # records whose id had been read before
    conflicts: Tuple[str, ...] = ()  # ids of which a copy differs from the first: never right


def read_findings(
    connection: Connection,
    topics: Topics,
    run_ids: Union[str, Sequence[str]],
    left_out: Optional[Mapping[str, Mapping[str, int]]] = None,
) -> Dict[str, RecordedFindings]:
    """What the topics hold of each run's verdicts and actions now.

    Verdicts that a detector wrote after it was left out are dropped. BrokerError.
    """
    runs = (run_ids,) if isinstance(run_ids, str) else tuple(run_ids)
    collected = {run_id: _Collected((left_out or {}).get(run_id, {})) for run_id in runs}
    for topic in (topics.verdicts, topics.actions):
        with open_topic(connection, topic) as reader:
            partitions = sorted({reader.partition_of(run_id) for run_id in runs})
            for record in reader.read(reader.ranges(partitions)):
                found = collected.get((record.key or b"").decode("utf-8", "replace"))
                if found is not None:
                    found.take(record)
    return {run_id: found.result() for run_id, found in collected.items()}


class Difference(NamedTuple):
    """How a replay's findings of one run compare with the recorded ones."""

    run_id: str
    num_verdicts: int  # that are the same
    num_actions: int
    only_replayed: Tuple[Finding, ...]  # not recorded, or not yet: a worker may be behind
    only_recorded: Tuple[Finding, ...]
    changed: Tuple[Tuple[Finding, Finding], ...]  # replayed and recorded, of one id
    conflicts: Tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether every record is the same, as a whole."""
        return not (self.only_replayed or self.only_recorded or self.changed or self.conflicts)


def compare(run_id: str, replayed: Sequence[Finding], recorded: RecordedFindings) -> Difference:
    """Compares whole records, bit for bit; their order follows from their ordinals."""
    theirs: Dict[str, Finding] = {each.id: each for each in recorded.verdicts}
    theirs.update({each.id: each for each in recorded.actions})
    ours: Dict[str, Finding] = {each.id: each for each in replayed}
    changed: List[Tuple[Finding, Finding]] = []
    same: List[Finding] = []
    for name, finding in ours.items():
        other = theirs.get(name)
        if other is not None:
            if _text(finding) == _text(other):
                same.append(finding)
            else:
                changed.append((finding, other))
    num_verdicts = len([finding for finding in same if isinstance(finding, Verdict)])
    return Difference(
        run_id,
        num_verdicts,
        len(same) - num_verdicts,
        tuple([finding for name, finding in ours.items() if name not in theirs]),
        tuple([finding for name, finding in theirs.items() if name not in ours]),
        tuple(changed),
        recorded.conflicts,
    )


class _Collected:
    """One run's records as they are read."""

    def __init__(self, left_out: Mapping[str, int]) -> None:
        self._left_out = left_out
        self._found: Dict[str, Finding] = {}
        self._copies = 0
        self._conflicts: Dict[str, None] = {}

    def take(self, record: Record) -> None:
        """A record of the verdicts or actions topic; one that cannot be read conflicts."""
        table, value = header(record.headers, TABLE_HEADER), record.value or b""
        try:
            finding: Finding = (
                decode_verdict(value) if table == "verdicts" else decode_action(value)
            )
        except (ValueError, TypeError) as error:
            name = header(record.headers, ID_HEADER) or f"offset {record.offset}"
            self._conflicts[f"{name}: {error}"] = None
            return
        if isinstance(finding, Verdict):
            last = self._left_out.get(finding.detector)
            if last is not None and finding.ordinal > last:
                return
        before = self._found.setdefault(finding.id, finding)
        if before is not finding:
            self._copies += 1
            if _text(before) != _text(finding):
                self._conflicts[finding.id] = None

    def result(self) -> RecordedFindings:
        """All of them, in a replay's order."""
        places = {cls.name: place for place, cls in enumerate(registered())}
        verdicts = [each for each in self._found.values() if isinstance(each, Verdict)]
        actions = [each for each in self._found.values() if isinstance(each, Action)]
        verdicts.sort(key=lambda each: (each.ordinal, places.get(each.detector, len(places))))
        actions.sort(key=lambda each: each.ordinal)
        return RecordedFindings(
            tuple(verdicts), tuple(actions), self._copies, tuple(self._conflicts)
        )


def _text(finding: Finding) -> str:
    """All of the record: equal texts are equal bits, NaN included."""
    return json.dumps(finding.to_dict(), sort_keys=True)
