"""How much one worker of a fleet takes: ``throughput.py --kafka`` runs this."""

from __future__ import annotations

import os
import signal
import time
from itertools import chain
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from fleet import PACKED, Fleet, Worker, log_of, names_in, packed, wait_for
from measure import Progress, Row, at_least, at_most, information, median
from plarv_processors.detectors import BUILTIN
from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Event, StepEvent
from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.kafka_types import require_kafka
from plarv_schemas.messages import Message, event_messages
from plarv_schemas.topic_reader import open_topic
from plarv_schemas.topics import MAX_MESSAGE_BYTES, Topics

__all__ = ["fleet_rows"]

_PARTITIONS = 4
_RUNS = 100
_RUN_STEPS = 130  # of the many runs: two messages, so that windows of 128 steps are full
_LOOK_S = 0.5
_LONG_S = 900.0
_TIMES = 3  # restarts
_QUIET_S = 6.0  # without a new snapshot: all are out


def fleet_rows(fleet: Fleet, quick: bool) -> Iterator[Row]:
    """Every row of ``--kafka``."""
    yield from wire_bytes(fleet, PACKED * (32 if quick else 320))
    yield from worker_speed(fleet, PACKED * (10 if quick else 50))
    yield from single_steps(fleet, 40 if quick else 120)
    yield from worker_restart(fleet, 200 if quick else 1_000, 1 if quick else _TIMES)
    yield from worker_memory(fleet, 1_000 if quick else 10_000)


def wire_bytes(fleet: Fleet, steps: int) -> Iterator[Row]:
    """Of the log's record batches, each with one message, as an unhurried shipper sends them."""
    size, plain = _wire_bytes(fleet, steps, PACKED)
    yield at_most(
        f"bytes a step on the wire, {PACKED} a message",
        f"{size:.1f} B (Arrow without lz4 {plain:.1f})",
        size,
        80.0,
        "B",
        uncompressed=plain,
    )
    size, plain = _wire_bytes(fleet, steps // PACKED, 1)
    measured = f"{size:,.0f} B (Arrow without lz4 {plain:,.0f})"
    yield information("   one a message", measured, value=size, unit="B", uncompressed=plain)


def _wire_bytes(fleet: Fleet, steps: int, together: int) -> Tuple[float, float]:
    """Bytes a step, and those before compression."""
    topics = fleet.topics(1)
    messages = packed(log_of("gpt-125m-20261123-101500-4f2a", steps), together)[1:]
    options: Dict[str, Any] = {"compression_type": "lz4", "batch_size": MAX_MESSAGE_BYTES}
    with producer_client(fleet.connection, **options) as producer:
        for message in messages:
            producer.send(
                topics.steps, key=message.key, value=message.value, headers=message.headers
            ).get(30.0)
    plain = sum(len(message.value) for message in messages)
    return _log_bytes(fleet, topics) / steps, plain / steps


def worker_speed(fleet: Fleet, steps: int) -> Iterator[Row]:
    """Steps a second of a worker that has a backlog, with one partition idle."""
    topics = fleet.topics(_PARTITIONS)
    names = names_in(range(_PARTITIONS - 1), _PARTITIONS, _RUNS)
    logs = {name: log_of(name, steps) for name in names}
    messages = {name: packed(log) for name, log in logs.items()}
    fleet.produce(topics, chain.from_iterable(zip(*messages.values())))
    total = _RUNS * (steps + 1)
    sample = [logs[name] for name in names[:10]]
    del messages
    engine = [_engine_us(sample)]
    with fleet.worker(topics) as worker:
        found = _catch_up(worker, total, "a worker's speed")
    engine.append(_engine_us(sample))
    yield from _speed_rows(total, found, engine)


def _speed_rows(
    total: int, found: Dict[str, float], engine: Sequence[Tuple[float, float]]
) -> Iterator[Row]:
    """A worker's speed, against the pure engine's before and after."""
    pure, pure_cpu = (median([each[place] for each in engine]) for place in (0, 1))
    step_us, cpu_us = found["step_us"], found["cpu_us"]
    load = os.getloadavg()[0]
    yield at_least(
        f"one worker, 12 detectors, {_RUNS} runs, {PACKED} steps a message",
        f"{1e6 / step_us:,.0f} steps/s (load {load:.1f})",
        1e6 / step_us,
        15_000,
        "steps/s",
        load=load,
        steps=total,
        **found,
    )
    yield at_most(
        "   time a step beyond the pure engine",
        f"{step_us - pure:.1f} us ({step_us:.1f} - {pure:.1f})",
        step_us - pure,
        22.0,
        "us",
        step_us=step_us,
        engine_us=pure,
        engine_each=engine,
        folds_us=found["folds_us"],
    )
    yield information(
        "   the same in CPU time, whoever else uses the machine",
        f"{cpu_us - pure_cpu:.1f} us ({cpu_us:.1f} - {pure_cpu:.1f})",
        value=cpu_us - pure_cpu,
        unit="us",
        cpu_us=cpu_us,
        engine_cpu_us=pure_cpu,
    )


def single_steps(fleet: Fleet, steps: int) -> Iterator[Row]:
    """The same worker where each message holds one step, as a quick link has them."""
    topics = fleet.topics(_PARTITIONS)
    names = names_in(range(_PARTITIONS), _PARTITIONS, _RUNS)
    messages = [packed(log_of(name, steps), 1) for name in names]
    fleet.produce(topics, chain.from_iterable(zip(*messages)))
    with fleet.worker(topics) as worker:
        found = _catch_up(worker, _RUNS * (steps + 1), "a worker's speed, single steps")
    yield information(
        f"one worker, 12 detectors, {_RUNS} runs, one step a message",
        f"{1e6 / found['step_us']:,.0f} steps/s (CPU {found['cpu_us']:.0f} us a step)",
        value=1e6 / found["step_us"],
        unit="steps/s",
        load=os.getloadavg()[0],
        **found,
    )


def worker_restart(fleet: Fleet, runs: int, times: int) -> Iterator[Row]:
    """Kill -9 with many open runs: from the start of the process that follows to the first verdict,
    on the first step of a run that nobody knew.
    """
    topics = fleet.topics(_PARTITIONS)
    fleet.produce(topics, _many(runs))
    options = ("--snapshot-every", "2")
    taken: List[float] = []
    worker = Worker(fleet, topics, "w1", options)
    bar = Progress("restarts", times + 1)
    try:
        _wait_until_judged(worker, runs * (_RUN_STEPS + 1))
        _wait_for_snapshots(fleet, topics)
        for number in range(times):
            bar.add()
            worker.end(signal.SIGKILL)
            begin = time.monotonic()
            worker = Worker(fleet, topics, "w1", options)
            taken.append(_first_verdict(fleet, topics, f"fresh-{number}") - begin)
            _wait_for_snapshots(fleet, topics)
    finally:
        worker.end()
        bar.close()
    middle, load = median(taken), os.getloadavg()[0]
    each = ", ".join(f"{seconds:.1f}" for seconds in taken)
    yield at_most(
        f"kill -9 with {runs:,} open runs: restart to first verdict",
        f"{middle:.1f} s (each {each}; load {load:.1f})",
        middle,
        5.0,
        "s",
        runs=runs,
        each_s=taken,
        load=load,
    )


def worker_memory(fleet: Fleet, runs: int) -> Iterator[Row]:
    """Resident memory with many open runs, once all of them are judged and in snapshots."""
    topics = fleet.topics(_PARTITIONS)
    fleet.produce(topics, _many(runs))
    with fleet.worker(topics) as worker:
        wait_for(lambda: worker.judged(len(BUILTIN)) > 0, _LONG_S, "first steps", 0.2)
        few = worker.resident_mb()[0]
        _wait_until_judged(worker, runs * (_RUN_STEPS + 1))
        _wait_for_snapshots(fleet, topics)
        now, most = worker.resident_mb()
    yield at_most(
        f"one worker, {runs:,} open runs of {_RUN_STEPS} steps, resident",
        f"{now:.0f} MB (at most {most:.0f}; {few:.0f} at first)",
        most,
        500.0,
        "MB",
        now_mb=now,
        first_mb=few,
        run_kb=(now - few) * 1024 / runs,
        runs=runs,
    )
    snapshots = _log_bytes(fleet, topics, topics.snapshots)
    yield information(
        "   snapshots of them in the topic, before compaction",
        f"{snapshots / runs / 1024:.1f} KB a run",
        value=snapshots / runs / 1024,
        unit="KB",
    )


def _engine_us(logs: Sequence[Sequence[Event]]) -> Tuple[float, float]:
    """Microseconds of the pure engine a step, and of CPU time."""
    count = 0
    begin, cpu = time.perf_counter(), time.process_time()
    for log in logs:
        fold = Engine(EngineConfig(detectors=BUILTIN)).fold
        for event in log:
            fold(event)
        count += len(log)
    taken, cpu_taken = time.perf_counter() - begin, time.process_time() - cpu
    return taken / count * 1e6, cpu_taken / count * 1e6


def _catch_up(worker: Worker, total: int, what: str) -> Dict[str, float]:
    """Microseconds a step between the first steps that the worker judged and the last 5 %."""
    bar = Progress(what, 100)
    wait_for(lambda: worker.judged(len(BUILTIN)) > 0, _LONG_S, "first steps", 0.05)
    first, begin, cpu, folds = _state(worker)
    last, now = first, begin
    shown = 0
    while last < 0.95 * total:
        time.sleep(_LOOK_S)
        last, now, *_ = _state(worker)
        bar.add(int(100 * last / total) - shown)
        shown = int(100 * last / total)
    bar.close()
    _, _, cpu_end, folds_end = _state(worker)
    return {
        "step_us": (now - begin) / (last - first) * 1e6,
        "cpu_us": (cpu_end - cpu) / (last - first) * 1e6,
        "folds_us": (folds_end - folds) / (last - first) * 1e6,
    }


def _state(worker: Worker) -> Tuple[float, float, float, float]:
    """Steps judged, the time, CPU seconds, seconds in folds."""
    judged = worker.judged(len(BUILTIN))
    return judged, time.perf_counter(), worker.cpu_s(), worker.detector_seconds()


def _many(runs: int) -> Iterator[Message]:
    """The messages of many short runs, those of each one after the other."""
    template = log_of("run", _RUN_STEPS)
    for number in range(runs):
        name = f"open-{number:06d}"
        yield from packed([event._replace(run_id=name) for event in template])


def _wait_until_judged(worker: Worker, total: int) -> None:
    wait_for(lambda: worker.judged(len(BUILTIN)) >= total, _LONG_S, "end of the backlog", _LOOK_S)


def _wait_for_snapshots(fleet: Fleet, topics: Topics) -> None:
    """Until nothing has been added to the snapshots for a while."""
    with open_topic(fleet.connection, topics.snapshots) as reader:
        seen: Dict[int, Any] = {}
        since = time.monotonic()

        def is_quiet() -> bool:
            nonlocal seen, since
            found: Dict[int, Any] = dict(reader.ranges())
            if found != seen:
                seen, since = found, time.monotonic()
            return bool(seen) and time.monotonic() - since > _QUIET_S

        wait_for(is_quiet, _LONG_S, "end of the snapshots", _LOOK_S)


def _first_verdict(fleet: Fleet, topics: Topics, run_id: str) -> float:
    """Sends a step without a number of a new run; the time at which its verdict came."""
    event = StepEvent(run_id, "b" * 16, 0, 0, 0, time_ns=time.time_ns(), loss=float("nan"))
    fleet.produce(topics, iter(event_messages([event])))
    with open_topic(fleet.connection, topics.verdicts) as reader:
        partition = reader.partition_of(run_id)
        for record in reader.follow({partition: 0}):
            if record is not None and record.key == run_id.encode():
                return time.monotonic()
    raise AssertionError("follow() has no end")


def _log_bytes(fleet: Fleet, topics: Topics, topic: str = "") -> int:
    """Bytes of a topic's record batches on the brokers' disks; of the log where none is named."""
    admin = require_kafka("kafka.admin").KafkaAdminClient(
        bootstrap_servers=list(fleet.connection.brokers)
    )
    try:
        answer: Any = admin.describe_log_dirs()
    finally:
        admin.close()
    wanted = topic or topics.steps
    sizes: Dict[int, int] = {}  # of each partition: the copies on other brokers are the same
    for broker in answer:
        for folder in broker["log_dirs"]:
            for held in folder["topics"]:
                for each in held["partitions"] if held["name"] == wanted else ():
                    sizes[each["partition_index"]] = int(each["partition_size"])
    return sum(sizes.values())
