"""Messages that the workers could not read: what there is, and sending them again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Dict, List, NamedTuple, Sequence, Set, Tuple

from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.messages import Message
from plarv_schemas.topic_reader import Record, TopicRange, open_topic
from plarv_schemas.topics import Topics, header, make_headers

__all__ = ["DeadLetter", "letter_of", "read_dead_letters", "send_again"]

REASON_HEADER = "argus-reason"
SOURCE_TOPIC_HEADER = "argus-source-topic"
SOURCE_PARTITION_HEADER = "argus-source-partition"
SOURCE_OFFSET_HEADER = "argus-source-offset"
SENT_HEADER = "argus-sent"  # of a marker: the offset, in its partition, of the letter sent again

_ADDED = (REASON_HEADER, SOURCE_TOPIC_HEADER, SOURCE_PARTITION_HEADER, SOURCE_OFFSET_HEADER)
_ACKNOWLEDGED_S = 30.0
_MAX_REASON = 500  # characters
_MAX_BYTES = 4 * 1024 * 1024

_Source = Tuple[str, str, str]  # topic, partition, offset


class DeadLetter(NamedTuple):
    """One message that could not be read; its value stays in the topic."""

    partition: int  # of the dead letters' topic
    offset: int
    time_ms: int  # UTC
    key: str  # the run's id, where the message had one
    size_bytes: int
    reason: str
    source_topic: str
    source_partition: str
    source_offset: str
    sent: bool  # again


def letter_of(message: Any, source_topic: str, reason: str) -> Message:
    """The letter about a message that a client received: its own key, headers and value, and why.

    ``message``: any client's, with partition, offset, key, headers and value.
    """
    headers: Dict[str, bytes] = {
        **dict(message.headers or {}),
        REASON_HEADER: reason[:_MAX_REASON].encode("utf-8"),
        SOURCE_TOPIC_HEADER: source_topic.encode("utf-8"),
        SOURCE_PARTITION_HEADER: str(message.partition).encode("ascii"),
        SOURCE_OFFSET_HEADER: str(message.offset).encode("ascii"),
    }
    return Message(message.key or b"", message.value or b"", list(headers.items()))


def read_dead_letters(connection: Connection, topics: Topics) -> List[DeadLetter]:
    """All letters that the topic holds now, each message once. BrokerError."""
    letters: Dict[Tuple[int, int], DeadLetter] = {}
    sent: Set[Tuple[int, int]] = set()
    with open_topic(connection, topics.dead_letters) as reader:
        for record in reader.read(reader.ranges()):
            mark = header(record.headers, SENT_HEADER)
            if mark is None:
                letters[record.partition, record.offset] = _letter(record)
            elif mark.isdigit():
                sent.add((record.partition, int(mark)))
    sent_sources = {_source(letters[place]) for place in sent if place in letters}
    found: Dict[_Source, DeadLetter] = {}  # workers with other detectors put the same one in
    for place in sorted(letters):
        source = _source(letters[place])
        if source not in found:
            found[source] = letters[place]._replace(sent=source in sent_sources)
    return list(found.values())


def send_again(connection: Connection, topics: Topics, letters: Sequence[DeadLetter]) -> int:
    """Puts letters back into the log, under their key; how many. BrokerError.

    One that does not come from there is left where it is.

    A marker behind each keeps in mind that it was sent. Killed in between, it is sent twice the
    next time: readers know an event that they have.
    """
    wanted = {(letter.partition, letter.offset) for letter in letters}
    ranges: Dict[int, TopicRange] = {}
    for partition, offset in wanted:
        begin, end = ranges.get(partition, (offset, offset + 1))
        ranges[partition] = TopicRange(min(begin, offset), max(end, offset + 1))
    count = 0
    with ExitStack() as stack:
        reader = stack.enter_context(open_topic(connection, topics.dead_letters))
        producer = stack.enter_context(producer_client(connection, max_request_size=_MAX_BYTES))
        for record in reader.read(ranges):
            target = header(record.headers, SOURCE_TOPIC_HEADER)
            if (record.partition, record.offset) not in wanted or target != topics.steps:
                continue  # a letter does not choose any topic it likes
            headers = [pair for pair in record.headers if pair[0] not in _ADDED]
            producer.send(topics.steps, value=record.value, key=record.key, headers=headers).get(
                timeout=_ACKNOWLEDGED_S
            )
            producer.send(
                topics.dead_letters,
                value=b"",
                key=record.key,
                headers=make_headers(sent=record.offset),
                partition=record.partition,
            ).get(timeout=_ACKNOWLEDGED_S)
            count += 1
    return count


def _letter(record: Record) -> DeadLetter:
    def said(name: str) -> str:
        return header(record.headers, name) or ""

    return DeadLetter(
        record.partition,
        record.offset,
        record.time_ms,
        (record.key or b"").decode("utf-8", "replace"),
        len(record.value or b""),
        said(REASON_HEADER),
        said(SOURCE_TOPIC_HEADER),
        said(SOURCE_PARTITION_HEADER),
        said(SOURCE_OFFSET_HEADER),
        sent=False,
    )


def _source(letter: DeadLetter) -> _Source:
    """What the letter is about; one that does not say so is about itself."""
    if not letter.source_offset:
        return ("", str(letter.partition), str(letter.offset))
    return (letter.source_topic, letter.source_partition, letter.source_offset)
