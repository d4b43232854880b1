"""How fast a sink writes what a fleet's topics hold, and how little of the disk it takes.

    python benchmarks/store.py [--json FILE] [--quick] [--brokers HOST:PORT]

The log: runs whose steps have 15 scalar columns, 512 steps a message, as a shipper packs them while
the brokers answer slower than the loop goes. The sink is one process; its time is the clock's,
from its first message to its last file, so the machine's load counts. A Kafka of its own unless
--brokers or ARGUS_TEST_BROKERS names one.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import threading
import time
from typing import Iterable, Iterator, List

from fleet import Fleet, add_brokers, open_fleet
from measure import Row, arguments, at_least, at_most, finish, information
from plarv_schemas.events import Event, StepEvent
from plarv_schemas.messages import Message, event_messages
from plarv_sinks.compact import compact
from plarv_sinks.sink.service import Sink, SinkConfig
from plarv_sinks.store import Store

_PACKED = 512
_PARTITIONS = 3
_RUNS = 40
_DAY_NS = 86_400_000_000_000


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    parser = arguments(__doc__, "store")
    add_brokers(parser)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with open_fleet(options.brokers) as fleet:
        rows = sink_rows(fleet, 2_560 if options.quick else 25_600)
        finish("store", rows, options.json, quick=options.quick, load_before=load_before)


def sink_rows(fleet: Fleet, steps: int) -> Iterator[Row]:
    """The sink's speed, the bytes of a step, and the compaction of what it wrote."""
    topics, total = fleet.topics(_PARTITIONS), _RUNS * steps
    fleet.produce(topics, _messages(steps))
    location = fleet.folder / "store"
    store = Store(location, print, create=True)
    config = SinkConfig(fleet.connection, topics, f"{topics.prefix}.sink", flush_s=2.0)
    seconds, cpu_s = _run_until_written(Sink(config, store, print), total)
    yield at_least(
        f"sink, one process, {_RUNS} runs, {_PACKED} steps a message",
        f"{total / seconds:,.0f} steps/s (CPU {1e6 * cpu_s / total:.1f} us a step)",
        total / seconds,
        200_000,
        "steps/s",
        steps=total,
        load=os.getloadavg()[0],
        cpu_us=1e6 * cpu_s / total,
    )
    fresh = _bytes(store) / total
    yield at_most("bytes a step on disk, 15 scalar columns", f"{fresh:.1f} B", fresh, 40.0, "B")
    begun = time.monotonic()
    done = compact(location, tell=print)
    took = time.monotonic() - begun
    yield information(
        "   compacted: a file for each run and day",
        f"{_bytes(store) / total:.1f} B, {done.rows / took:,.0f} steps/s",
        value=_bytes(store) / total,
        unit="B",
        steps_per_s=done.rows / took,
    )
    text = sum(len(_json_line(event)) for event in _steps("run-0000", 1000)) / 1000
    yield information("   the same as JSON lines", f"{text:,.0f} B", value=text, unit="B")


def _run_until_written(sink: Sink, total: int) -> tuple[float, float]:
    """Seconds of the clock and of the CPU from the first message to the last file."""
    stop, begun, cpu = threading.Event(), 0.0, 0.0
    thread = threading.Thread(target=sink.run, args=(stop,))
    thread.start()
    while sink.counts.rows < total and thread.is_alive():
        if not begun and (sink.counts.waiting or sink.counts.rows):
            begun, cpu = time.monotonic(), time.process_time()
        time.sleep(0.002)
    ended, cpu_ended = time.monotonic(), time.process_time()
    stop.set()
    thread.join()
    # What was read before the first look counts as read in no time: one poll of many.
    return ended - begun, cpu_ended - cpu


def _messages(steps: int) -> Iterator[Message]:
    """All runs side by side, made as they are sent."""
    runs = [f"run-{number:04d}" for number in range(_RUNS)]
    template = list(_steps("", steps))
    for begin in range(0, steps, _PACKED):
        for run_id in runs:
            part: List[Event] = [
                event._replace(run_id=run_id, session=f"{run_id[4:]:0>16}")
                for event in template[begin : begin + _PACKED]
            ]
            yield from event_messages(part)


def _steps(run_id: str, steps: int) -> Iterable[StepEvent]:
    """A run that goes well; what a trainer holds as float32 is one."""
    chance = random.Random(7)
    gauss = chance.gauss
    now = 20_000 * _DAY_NS
    for step in range(steps):
        step_ms = _single(250.0 + gauss(0.0, 3.0))
        now += int(step_ms * 1e6)
        loss = _single(2.0 + 3.0 * math.exp(-step / 2000.0) + gauss(0.0, 0.05))
        norm = _single(1.0 + gauss(0.0, 0.1))
        yield StepEvent(
            run_id, "0" * 16, step, 0, step,
            time_ns=now,
            epoch=step / 1000.0,
            loss=loss,
            grad_norm=norm,
            current_lr=1.5e-4 * (1.0 + math.cos(math.pi * step / steps)),
            update_norm=_single(0.01 + gauss(0.0, 0.001)),
            perplexity=_single(math.exp(loss)),
            grad_l1_norm=_single(100.0 * norm + gauss(0.0, 1.0)),
            grad_l2_norm=norm,
            forward_ms=_single(0.3 * step_ms + gauss(0.0, 1.0)),
            backward_ms=_single(0.6 * step_ms + gauss(0.0, 1.0)),
            step_time_ms=step_ms,
            batch_size=32,
            loss_scale=65536.0,
            world_size=1,
        )  # fmt: skip


def _json_line(event: StepEvent) -> str:
    """As a logger writes it that knows no columns."""
    fields = {name: value for name, value in event._asdict().items() if name != "parts"}
    return json.dumps(fields) + "\n"


def _bytes(store: Store) -> int:
    return sum(file.size for file in store.listed("steps"))


def _single(value: float) -> float:
    (found,) = struct.unpack("f", struct.pack("f", value))
    return float(found)


if __name__ == "__main__":
    main()
