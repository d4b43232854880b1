"""How long a fleet takes to answer, and what that costs the training loop.

    python benchmarks/latency.py [--brokers HOST:PORT] [--json FILE] [--quick]

A broker, workers and training processes, all on this machine. Times are the clock's. The two rows
about a broker that fails need one of its own, and are left out where --brokers or
ARGUS_TEST_BROKERS names one.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from children import Child, our_package
from fleet import MASTER_KEY, Fleet, LocalBroker, add_brokers, open_fleet, wait_for
from measure import (
    Progress,
    Row,
    arguments,
    at_most,
    finish,
    information,
    median,
    percentile,
)
from plarv_processors.detectors import BUILTIN
from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Event
from plarv_schemas.messages import decode_action, decode_events, decode_verdict
from plarv_schemas.run_log import read_run
from plarv_schemas.topic_reader import TopicRange, open_topic
from plarv_schemas.topics import TABLE_HEADER, Topics, header

_PER_S = 100.0  # steps
_PARTITIONS = 4
_PAUSE_S = 0.002  # between the steps whose cost is compared
_RUNS = 5  # of each transport, in turns
_TURNS = 10  # of each run's steps
_WARM_S = 2.0  # of a run, not counted
_SETTLE_S = 60.0
_TRAINERS = 4  # under the broker's outage
_OUTAGE_S = 10.0
_FIRST_HALF = ",".join(cls.name for cls in BUILTIN[:6])
_SECOND_HALF = ",".join(cls.name for cls in BUILTIN[6:])


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    parser = arguments(__doc__, "latency")
    add_brokers(parser)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with open_fleet(options.brokers) as fleet:
        rows = _rows(fleet, options.quick)
        finish("latency", rows, options.json, quick=options.quick, load_before=load_before)


def _rows(fleet: Fleet, quick: bool) -> Iterator[Row]:
    topics = fleet.topics(_PARTITIONS)
    with fleet.worker(topics) as worker:
        worker.wait_until_well()
        yield from verdict_latency(fleet, topics, 1_000 if quick else 6_000)
        yield from action_latency(fleet, topics, "one worker", 10 if quick else 100)
        yield from step_cost(fleet, topics, 500 if quick else 2_000)
        if fleet.own is not None:
            yield from silent_exit(fleet, topics, fleet.own)
            yield from outage(fleet, topics, fleet.own, 5.0 if quick else 15.0)
    if fleet.own is None:
        yield information("a broker that fails", "not measured: the broker is not ours")
    topics = fleet.topics(_PARTITIONS)
    halves = (("--detectors", _FIRST_HALF), ("--detectors", _SECOND_HALF, "--no-policy"))
    with ExitStack() as stack:
        for number, options in enumerate(halves):
            worker = stack.enter_context(fleet.worker(topics, *options, name=f"half-{number}"))
            worker.wait_until_well()
        yield from action_latency(fleet, topics, "two workers", 10 if quick else 100)


def verdict_latency(fleet: Fleet, topics: Topics, steps: int) -> Iterator[Row]:
    """From the call of step() until a reader of the verdicts' topic has what was found in it."""
    run_id = "benchmark-verdicts"
    arrived: Dict[int, float] = {}
    with _trainer(fleet, topics, "paced", run_id) as child:
        first = len(child.ask(count=10, per_s=_PER_S))  # it has begun
        child.tell("run", count=steps, per_s=_PER_S)
        until = time.monotonic() + steps / _PER_S + _WARM_S
        with open_topic(fleet.connection, topics.verdicts) as reader:
            bar = Progress("step to verdict", steps)
            shown = 0
            for record in reader.follow({reader.partition_of(run_id): 0}):
                now = time.monotonic()
                if record is not None and record.key == run_id.encode() and record.value:
                    step = decode_verdict(record.value).step
                    arrived.setdefault(step, now)
                    bar.add(step - shown)
                    shown = step
                if now > until:
                    break
            bar.close()
        answer: List[float] = child.answer()
    called = dict(enumerate(answer, start=first))
    begin = called[first] + _WARM_S
    taken = [1e3 * (at - called[n]) for n, at in arrived.items() if called.get(n, 0.0) > begin]
    yield from _latency_rows(f"step() to verdict on the topic, {_PER_S:g} steps/s", taken, 30, 100)


def action_latency(fleet: Fleet, topics: Topics, what: str, count: int) -> Iterator[Row]:
    """From the call of step() until the call in which the action about it was applied has ended."""
    run_id = f"benchmark-actions-{count}"
    taken: List[float] = []
    bar = Progress(f"step to action, {what}", count)
    with _trainer(fleet, topics, "actions", run_id) as child:
        child.ask(count=2, per_s=_PER_S)
        for _ in range(count):
            taken += child.ask(count=1, per_s=_PER_S)
            bar.add()
    bar.close()
    lost = count - len(taken)
    found = [1e3 * seconds for seconds in taken]
    yield from _latency_rows(f"step() to action applied, {what}", found, 80, 250, lost=lost)


def step_cost(fleet: Fleet, topics: Topics, steps: int) -> Iterator[Row]:
    """The median of the runs' ratios; in each run the two transports take turns."""
    ratios: Dict[float, List[float]] = {0.5: [], 0.99: []}
    times: Dict[float, List[Tuple[float, float]]] = {0.5: [], 0.99: []}
    bar = Progress("step() over Kafka and embedded", _RUNS * _TURNS)
    for number in range(_RUNS):
        kafka, embedded = _both(fleet, topics, number, steps // _TURNS, bar)
        for fraction, found in ratios.items():
            pair = percentile(kafka, fraction), percentile(embedded, fraction)
            times[fraction].append(pair)
            found.append(pair[0] / pair[1])
    bar.close()
    for fraction, limit in ((0.5, 1.1), (0.99, 1.3)):
        ratio = median(ratios[fraction])
        ours, other = (median([pair[place] for pair in times[fraction]]) for place in (0, 1))
        yield at_most(
            f"step() over Kafka against embedded, p{fraction * 100:g}",
            f"{ratio:.2f} x ({ours:.1f} and {other:.1f} us; load {_load():.1f})",
            ratio,
            limit,
            "x",
            each=ratios[fraction],
            kafka_us=ours,
            embedded_us=other,
            load=_load(),
        )


def _both(
    fleet: Fleet, topics: Topics, number: int, count: int, bar: Progress
) -> Tuple[List[float], List[float]]:
    """Microseconds of each step, over Kafka and embedded."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(_trainer(fleet, topics, "cost", f"benchmark-cost-{number}")),
            stack.enter_context(Child(our_package(), "cost", "fleet_workloads.py")),
        ]
        found: Tuple[List[float], List[float]] = ([], [])
        for turn in range(_TURNS):
            for place in (0, 1) if turn % 2 else (1, 0):
                found[place].extend(children[place].ask(count=count, pause_s=_PAUSE_S))
            bar.add()
        return found


def silent_exit(fleet: Fleet, topics: Topics, broker: LocalBroker) -> Iterator[Row]:
    """complete() and the end of the process, while the broker accepts and never answers."""
    with _trainer(fleet, topics, "paced", "benchmark-exit") as child:
        child.ask(count=200, per_s=_PER_S)
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            child.ask(count=200, per_s=_PER_S)
            found = child.ask("complete")
            total = child.end() - found["begin"]
        finally:
            os.kill(broker.pid, signal.SIGCONT)
    yield at_most(
        "exit with a broker that does not answer",
        f"{total:.2f} s (complete() {found['complete_s']:.2f}; load {_load():.1f})",
        total,
        2.0,
        "s",
        complete_s=found["complete_s"],
        load=_load(),
    )


def outage(fleet: Fleet, topics: Topics, broker: LocalBroker, around_s: float) -> Iterator[Row]:
    """The broker is killed under load and comes back: what is then in the topics is compared with
    the journals, and with what the engine finds in them.
    """
    names = [f"benchmark-outage-{number}" for number in range(_TRAINERS)]
    with ExitStack() as stack:
        children = [stack.enter_context(_trainer(fleet, topics, "paced", n)) for n in names]
        steps = int((2 * around_s + _OUTAGE_S + 5.0) * _PER_S)
        for child in children:
            child.ask(count=10, per_s=_PER_S)  # all have begun
        for child in children:
            child.tell("run", count=steps, per_s=_PER_S)
        time.sleep(around_s)
        broker.kill()
        time.sleep(_OUTAGE_S)
        broker.start()
        for child in children:
            child.answer()
        folders = {n: Path(c.ask("complete")["folder"]) for n, c in zip(names, children)}
        journals = {name: list(read_run(folder)) for name, folder in folders.items()}
    found: Dict[str, int] = {}

    def is_whole() -> bool:
        found.update(_compared(fleet, topics, journals))
        return not any(found[what] for what in ("steps", "records", "wrong"))

    try:
        wait_for(is_whole, _SETTLE_S, "whole log", 1.0)
    except RuntimeError:
        pass  # then the row says what is missing
    lost = found["steps"] + found["records"] + found["wrong"]
    total = sum(len(journal) for journal in journals.values())
    yield at_most(
        f"broker killed for {_OUTAGE_S:g} s: steps, verdicts lost or wrong",
        f"{lost} of {total:,} steps, {found['expected']:,} records (load {_load():.1f})",
        lost,
        0,
        "",
        **found,
        events=total,
        load=_load(),
    )


def _compared(
    fleet: Fleet, topics: Topics, journals: Mapping[str, Sequence[Event]]
) -> Dict[str, int]:
    """How many steps and records are missing in the topics, and how many records differ."""
    held: Dict[str, List[Event]] = {name: [] for name in journals}
    for run_id, table, headers, value in _read(fleet, topics.steps):
        if run_id in held and table in ("steps", "events"):
            held[run_id].extend(decode_events(headers, value))
    written: Dict[str, Dict[str, Any]] = {}
    for run_id, table, _, value in [*_read(fleet, topics.verdicts), *_read(fleet, topics.actions)]:
        if run_id in held:
            record = decode_verdict(value) if table == "verdicts" else decode_action(value)
            written[record.id] = record.to_dict()
    counts: Dict[str, int] = {"steps": 0, "records": 0, "wrong": 0, "expected": 0}
    for name, journal in journals.items():
        seen: Set[Tuple[str, int]] = {(event.session, event.record) for event in held[name]}
        counts["steps"] += sum((event.session, event.record) not in seen for event in journal)
        fold = Engine(EngineConfig(detectors=BUILTIN)).fold
        for record in [record for event in held[name] for record in fold(event)]:
            counts["expected"] += 1
            counts["records"] += record.id not in written
            counts["wrong"] += written.get(record.id, record.to_dict()) != record.to_dict()
    return counts


def _read(fleet: Fleet, topic: str) -> Iterator[Tuple[str, Optional[str], Any, bytes]]:
    """Run, table, headers and value of each record that a topic holds."""
    with open_topic(fleet.connection, topic) as reader:
        ranges: Dict[int, TopicRange] = reader.ranges()
        for record in reader.read(ranges):
            if record.key and record.value is not None:
                table = header(record.headers, TABLE_HEADER)
                yield record.key.decode(), table, record.headers, record.value


def _trainer(fleet: Fleet, topics: Topics, workload: str, run_id: str) -> Child:
    """A training process of the fleet; it holds the master key, which it needs for actions."""
    environment = fleet.environment(topics, ARGUS_RUN_ID=run_id, ARGUS_MASTER_KEY=MASTER_KEY)
    package = our_package()._replace(environment=environment)
    return Child(package, workload, "fleet_workloads.py")


def _latency_rows(
    what: str, taken_ms: Sequence[float], middle: float, high: float, **values: Any
) -> Iterator[Row]:
    for fraction, limit in ((0.5, middle), (0.99, high)):
        found = percentile(taken_ms, fraction)
        most = max(taken_ms, default=0.0)
        yield at_most(
            f"{what}, p{fraction * 100:g}",
            f"{found:.1f} ms ({len(taken_ms)}, at most {most:.0f}; load {_load():.1f})",
            found,
            limit,
            "ms",
            count=len(taken_ms),
            load=_load(),
            **values,
        )


def _load() -> float:
    return os.getloadavg()[0]


if __name__ == "__main__":
    main()
