"""A topic's partition becomes files: each record once, whatever is sent twice and wherever the sink
dies.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.processors.logs import names
from tests.sinks.stores import (
    STEPS,
    VERDICTS,
    as_json,
    assert_holds,
    findings_records,
    flush,
    folded,
    in_the_logs_order,
    named,
    packed,
    records_of,
    sink_into,
)

from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.messages import Message, Watermark, event_messages, watermark_message
from plarv_schemas.topic_reader import Record
from plarv_sinks.sink.partitions import Committed, Partition, load_partitions
from plarv_sinks.store import Store

pytest.importorskip("pyarrow")
pytest.importorskip("polars")
pytest.importorskip("kafka")


def runs_of(*streams: str, steps: int = 120) -> Dict[str, List[Event]]:
    return {f"run-{stream}": named(stream, f"run-{stream}", steps) for stream in streams}


def partition_of(store: Store, topic: Any = STEPS) -> Partition:
    (partition,) = load_partitions(store, [topic], {topic.name: {0}})
    return partition


@pytest.mark.parametrize("name", names)
def test_every_stream_comes_back_as_it_was_and_replays_to_the_same(
    name: str, tmp_path: Path
) -> None:
    records = records_of(packed(random.Random(1), runs_of(name)))
    sink_into(tmp_path / "store", {STEPS: records}, every=7)
    store = Store(tmp_path / "store")
    live = in_the_logs_order(records, f"run-{name}")
    assert_holds(store, {f"run-{name}": live})
    assert as_json(
        found.to_dict() for found in folded(list(store.events(f"run-{name}")))
    ) == as_json(found.to_dict() for found in folded(live))


def test_what_the_topic_holds_twice_is_there_once(tmp_path: Path) -> None:
    rng = random.Random(2)
    messages = packed(rng, runs_of("spike", "fleet"))
    doubled: List[Message] = []
    for message in messages:
        doubled.append(message)
        if rng.random() < 0.5:  # sent again, at once or some messages later
            doubled.insert(rng.randrange(max(0, len(doubled) - 5), len(doubled) + 1), message)
    records = records_of(doubled)
    sink_into(tmp_path / "store", {STEPS: records}, every=9)
    runs = {f"run-{name}": in_the_logs_order(records, f"run-{name}") for name in ("spike", "fleet")}
    assert_holds(Store(tmp_path / "store"), runs)


@pytest.mark.parametrize("seed", range(6))
def test_a_sink_that_dies_anywhere_leaves_every_event_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    runs = runs_of("divergence", "fleet", "sparse", steps=90)
    records = records_of(packed(rng, runs, longest=12))
    store = Store(tmp_path / "store", create=True)
    partition, deaths = partition_of(store), 0
    at = 0
    while at < len(records):
        partition.take(records[at], 0.0)
        at += 1
        if rng.random() > 0.2 and at < len(records):
            continue
        prepared = partition.prepare(store)
        if rng.random() < 0.5 and deaths < 40:  # it dies with some of its files under their names
            store.files.publish(prepared[: rng.randint(0, len(prepared))])
            deaths += 1
            partition = partition_of(store)
            at = partition.resume_at(None, 0)
            continue
        store.files.publish(prepared)
        partition.published()
    assert deaths > 3
    assert_holds(store, {run_id: in_the_logs_order(records, run_id) for run_id in runs})


def test_after_a_restart_copies_of_what_is_in_the_files_are_known(tmp_path: Path) -> None:
    messages = packed(random.Random(3), runs_of("spike"))
    records = records_of([*messages, *messages])
    half = len(messages)
    sink_into(tmp_path / "store", {STEPS: records[:half]})
    sink_into(tmp_path / "store", {STEPS: records})
    store = Store(tmp_path / "store")
    assert_holds(store, {"run-spike": in_the_logs_order(records[:half], "run-spike")})
    assert len(store.files.listed("fresh/table=steps")) == 1


def test_a_topic_that_was_made_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    messages = packed(random.Random(3), runs_of("spike"))
    sink_into(tmp_path / "store", {STEPS: records_of(messages)})
    again = STEPS._replace(topic_id="8" * 12)
    store = Store(tmp_path / "store")
    assert partition_of(store, again).resume_at(None, 0) == 0
    sink_into(tmp_path / "store", {again: records_of(messages)})  # as `argus sync` ships it again
    assert_holds(store, {"run-spike": in_the_logs_order(records_of(messages), "run-spike")})


def test_the_files_say_where_to_go_on_and_a_commit_only_on_top_of_them(tmp_path: Path) -> None:
    records = records_of(packed(random.Random(4), runs_of("spike")))
    sink_into(tmp_path / "store", {STEPS: records})
    last = len(records) - 1
    partition = partition_of(Store(tmp_path / "store"))
    assert partition.resume_at(None, 0) == last + 1
    assert partition.resume_at(Committed(last + 500, last), 0) == last + 500  # watermarks, say
    assert partition.resume_at(Committed(last + 500, last - 3), 0) == last + 1  # other files
    assert partition.resume_at(Committed(3, last), 0) == last + 1
    assert partition.resume_at(None, last + 9_000) == last + 9_000  # the topic begins there
    empty = partition_of(Store(tmp_path / "another", create=True))
    assert empty.resume_at(Committed(last + 500, last), 0) == 0


def test_messages_that_cannot_be_read_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    messages = packed(random.Random(5), runs_of("spike"))
    good = records_of(messages)
    foreign = [
        good[0]._replace(value=b"no batch"),
        good[0]._replace(value=None),
        good[0]._replace(key=b"another run"),
        good[0]._replace(key=None),
        good[0]._replace(headers=(("argus-table", b"verdicts"),)),
        good[0]._replace(headers=()),
    ]
    mixed = [good[0], *foreign, *good[1:]]
    records = [record._replace(offset=offset) for offset, record in enumerate(mixed)]
    store = Store(tmp_path / "store", create=True)
    partition = partition_of(store)
    for record in records:
        partition.take(record, 0.0)
    flush(store, partition)
    assert partition.gathers.poison == len(foreign)
    assert_holds(store, {"run-spike": in_the_logs_order(good, "run-spike")})


def test_of_a_message_that_lies_over_what_is_there_the_new_part_is_kept(tmp_path: Path) -> None:
    steps = [StepEvent("run", "s" * 16, record, 0, record, loss=1.0) for record in range(40)]
    first, second = event_messages(steps[:30]), event_messages(steps[20:])
    sink_into(tmp_path / "store", {STEPS: records_of([*first, *second])})
    assert_holds(Store(tmp_path / "store"), {"run": list(steps)})


def test_a_step_that_goes_back_within_a_message_opens_the_next_attempt(tmp_path: Path) -> None:
    order = [*range(30), *range(10, 40)]
    steps = [StepEvent("run", "s" * 16, record, 0, at, loss=1.0) for record, at in enumerate(order)]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(steps))})
    store = Store(tmp_path / "store")
    assert_holds(store, {"run": list(steps)})
    assert store.frame("steps", "run")["attempt"].to_list() == [1] * 30 + [2] * 30
    assert store.run_rows()["run"].attempt == 2


def test_verdicts_and_actions_are_there_once_each_and_watermarks_not_at_all(tmp_path: Path) -> None:
    events = named("divergence", "run", 600)
    found = folded(events)
    log: Dict[Any, List[Record]] = {STEPS: records_of(event_messages(events))}
    for topic, records in findings_records(found).items():
        marked = [record for each in records for record in (each, watermark(each), each)]
        log[topic] = [each._replace(offset=offset) for offset, each in enumerate(marked)]
    sink_into(tmp_path / "store", log, every=5)
    sink_into(tmp_path / "store", log)
    store = Store(tmp_path / "store")
    assert as_json(each.to_dict() for each in store.verdicts("run")) == as_json(
        each.to_dict() for each in found if isinstance(each, Verdict)
    )
    assert as_json(each.to_dict() for each in store.actions("run")) == as_json(
        each.to_dict() for each in found if isinstance(each, Action)
    )
    verdicts = store.frame("verdicts", "run")
    assert verdicts.height == len([each for each in found if isinstance(each, Verdict)])


def watermark(record: Record) -> Record:
    made = watermark_message(Watermark({"loss_spike-1": 7}))
    return record._replace(key=made.key, value=made.value, headers=tuple(made.headers))


def test_verdicts_of_a_detector_that_had_been_left_out_by_then_are_not_given(
    tmp_path: Path,
) -> None:
    events = named("divergence", "run", 600)
    found = folded(events)
    (last, *_) = [each for each in found if isinstance(each, Verdict)]
    left = ControlEvent(
        "run", "policy", 0, None, "detector_left_out",
        data={"detector": last.detector, "ordinal": last.ordinal - 1},
    )  # fmt: skip
    log = {STEPS: records_of(event_messages([*events, left])), **findings_records(found)}
    sink_into(tmp_path / "store", log)
    given = Store(tmp_path / "store").verdicts("run")
    assert given
    assert last.detector not in {verdict.detector for verdict in given}


def test_watermarks_alone_make_no_file(tmp_path: Path) -> None:
    (record,) = records_of([watermark_message(Watermark({"loss_spike-1": 7}))], VERDICTS)
    store = Store(tmp_path / "store", create=True)
    partition = partition_of(store, VERDICTS)
    partition.take(record, 0.0)
    assert partition.next == 1
    assert partition.since is None
    assert partition.prepare(store) == []


def test_a_flush_that_cannot_be_named_as_a_whole_leaves_nothing_and_is_made_again(
    tmp_path: Path,
) -> None:
    records = records_of(packed(random.Random(6), runs_of("spike")))
    store = Store(tmp_path / "store", create=True)
    partition = partition_of(store)
    half = len(records) // 2
    for record in records[:half]:
        partition.take(record, 0.0)
    in_the_way = tmp_path / "store" / "fresh" / "table=runs"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file, where a folder is wanted")
    with pytest.raises(OSError, match="table=runs"):
        flush(store, partition)
    assert store.files.listed("") == []
    assert store.files.names("_aside") == []
    in_the_way.unlink()
    for record in records[half:]:
        partition.take(record, 0.0)
    flush(store, partition)
    assert_holds(store, {"run-spike": in_the_logs_order(records, "run-spike")})
