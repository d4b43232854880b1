"""How fast the engine judges, and how large its state is.

    python benchmarks/throughput.py [--json FILE] [--quick] [--kafka [--brokers HOST:PORT]]

One thread, since the fold is a pure function; events are made before the clock starts. Times are
CPU times of the process: what one core gives.
--kafka measures a fleet's worker instead, on a Kafka of its own unless --brokers or
ARGUS_TEST_BROKERS names one. Those times are the clock's, all processes on this machine.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

from fleet import add_brokers, open_fleet
from fleet_throughput import fleet_rows
from measure import Progress, Row, arguments, at_least, at_most, finish, information, median
from plarv_processors.detectors import BUILTIN
from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.stored_fold import StoredFold
from plarv_schemas.events import SCALAR_COLUMNS, StepEvent
from plarv_schemas.journal import CORE, CORE_SIZE, CORE_STRUCT, pack_full
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.run_log import read_run

_REPEATS = 5
_SAMPLES = 32  # of a step
_DATASET = 20_000  # samples
_STATIC = ("config", "version")  # of a detector: the same for every run
_BOTH = 3  # HAS_LOSS | HAS_GRAD_NORM


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    parser = arguments(__doc__, "throughput")
    parser.add_argument("--kafka", action="store_true", help="measure a fleet's worker instead")
    add_brokers(parser)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    if options.kafka:
        with open_fleet(options.brokers) as fleet:
            rows = fleet_rows(fleet, options.quick)
            path = options.json.with_name(f"{options.json.stem}_kafka.json")
            finish("throughput --kafka", rows, path, quick=options.quick, load_before=load_before)
        return
    count = 10_000 if options.quick else 50_000
    repeats = 2 if options.quick else _REPEATS
    scalars = healthy_run(count)
    samples = with_samples(scalars[: count // 2])
    rows = chain(
        engine_speed("all scalar columns", scalars, repeats),
        engine_speed(f"{_SAMPLES} samples a step too", samples, repeats),
        detector_times(scalars, samples),
        state_size(scalars, samples),
        journal_speed(scalars),
    )
    finish("throughput", rows, options.json, quick=options.quick, load_before=load_before)


def healthy_run(count: int) -> List[StepEvent]:
    """A run that goes well, every scalar column set at every step: warm-up, decay, noise, a
    learning-rate schedule, a gradient that shrinks with the loss, now and then a slow step.
    """
    chance = random.Random(3)
    gauss = chance.gauss
    events: List[StepEvent] = []
    for step in range(count):
        level = 1.8 + 7.0 * math.exp(-step / 400.0) + 2.0 / (1.0 + step / 2000.0)
        loss = level * math.exp(gauss(0.0, 0.02))
        norm = (0.5 + 0.3 * level) * math.exp(gauss(0.0, 0.12))
        lr = 3e-4 * min(1.0, (step + 1) / 500.0) * 0.5 * (1.0 + math.cos(math.pi * step / count))
        forward, backward = 3.0 + gauss(0.0, 0.1), 6.0 + gauss(0.0, 0.2)
        events.append(
            StepEvent(
                "benchmark", "0" * 16, step, 0, step,
                time_ns=1_700_000_000_000_000_000 + step * 10_000_000,
                world_size=1,
                epoch=step / 5000.0,
                loss=loss,
                grad_norm=norm,
                current_lr=lr,
                update_norm=lr * 40.0 * math.exp(gauss(0.0, 0.05)),
                val_loss=level * 1.02 * math.exp(gauss(0.0, 0.005)),
                perplexity=math.exp(loss),
                grad_l1_norm=norm * 2000.0 * math.exp(gauss(0.0, 0.02)),
                grad_l2_norm=norm,
                forward_ms=forward,
                backward_ms=backward,
                step_time_ms=forward + backward + 1.0 + (4.0 if step % 97 == 0 else 0.0),
                batch_size=_SAMPLES,
                loss_scale=65536.0,
            )
        )  # fmt: skip
    assert all(getattr(events[-1], name) is not None for name in SCALAR_COLUMNS)
    return events


def with_samples(events: Sequence[StepEvent]) -> List[StepEvent]:
    """The same events with each batch's samples: harder and easier ones, each with its noise."""
    chance = random.Random(4)
    hardness = [math.exp(chance.gauss(0.0, 0.4)) for _ in range(_DATASET)]
    ids = [chance.getrandbits(63) for _ in range(_DATASET)]
    order = list(range(_DATASET))
    at = _DATASET
    found: List[StepEvent] = []
    for event in events:
        if at + _SAMPLES > _DATASET:
            chance.shuffle(order)
            at = 0
        batch = order[at : at + _SAMPLES]
        at += _SAMPLES
        assert event.loss is not None
        losses = [event.loss * hardness[i] * math.exp(chance.gauss(0.0, 0.1)) for i in batch]
        found.append(
            event._replace(
                sample_ids=tuple([ids[i] for i in batch]),
                sample_losses=tuple(losses),
                sample_confidences=tuple([math.exp(-loss) for loss in losses]),
                sample_margins=tuple([1.0 - 0.3 * loss for loss in losses]),
                sample_entropies=tuple([0.8 * loss for loss in losses]),
                sample_correct=tuple([int(loss < 2.5) for loss in losses]),
            )
        )
    return found


def engine_speed(what: str, events: Sequence[StepEvent], repeats: int) -> Iterator[Row]:
    """Steps a second through the whole fold: all twelve detectors and the policy."""
    taken: List[float] = []
    records = 0
    bar = Progress(what, repeats)
    for _ in range(repeats):
        engine = Engine(EngineConfig(detectors=BUILTIN))
        fold = engine.fold
        records = 0
        begin = time.process_time()
        for event in events:
            records += len(fold(event))
        taken.append(time.process_time() - begin)
        if engine.faults:
            raise RuntimeError(f"a detector failed: {engine.faults}")
        bar.add()
    bar.close()
    best, middle = len(events) / min(taken), len(events) / median(taken)
    yield at_least(
        f"engine, {len(BUILTIN)} detectors, {what}",
        f"{best:,.0f} steps/s (median {middle:,.0f}; {records} records)",
        best,
        25_000,
        "steps/s",
        median=middle,
        events=len(events),
        records=records,
    )


def detector_times(scalars: Sequence[StepEvent], samples: Sequence[StepEvent]) -> Iterator[Row]:
    """Microseconds of each detector's update, with scalars and with samples."""
    for cls in BUILTIN:
        plain = min(_update_us(cls, scalars) for _ in range(3))
        full = min(_update_us(cls, samples) for _ in range(3))
        measured = f"{plain:.2f} us (with samples {full:.2f})"
        yield information(f"   {cls.name}", measured, value=plain, unit="us", samples_us=full)


def _update_us(cls: Any, events: Sequence[StepEvent]) -> float:
    update = cls().update
    begin = time.process_time()
    for event in events:
        update(event)
    return (time.process_time() - begin) / len(events) * 1e6


def state_size(scalars: Sequence[StepEvent], samples: Sequence[StepEvent]) -> Iterator[Row]:
    """What the engine keeps of one run, in memory and in a snapshot: the most along the way."""
    resident: List[float] = []
    snapshot: List[float] = []
    for events in (scalars, samples):
        engine = Engine(EngineConfig(detectors=BUILTIN))
        for number, event in enumerate(events):
            engine.fold(event)
            if number % (len(events) // 10) == 0:
                resident.append(_resident([engine.detectors, engine.policy]) / 1024)
                snapshot.append(len(engine.snapshot()) / 1024)
    most, packed = max(resident), max(snapshot)
    yield at_most("state of one run, resident", f"{most:.1f} KB", most, 24.0, "KB")
    yield at_most("state of one run, snapshot", f"{packed:.1f} KB", packed, 12.0, "KB")


def _resident(values: Iterable[object]) -> int:
    """Bytes of everything below ``values`` but configurations, classes and shared constants."""
    known: Set[int] = set()
    total = 0
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in known or value is None or isinstance(value, (bool, type)):
            continue
        known.add(id(value))
        total += sys.getsizeof(value)
        waiting += _inside(value)
    return total


def _inside(value: Any) -> List[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if type(value) in (list, tuple, set, frozenset):
        return list(value)
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    parts = [getattr(value, name) for name in names if name not in _STATIC and hasattr(value, name)]
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _STATIC}
    return [*parts, attributes] if attributes else parts


def journal_speed(events: Sequence[StepEvent]) -> Iterator[Row]:
    """Events a second into the journal, out of it, and out of it through the fold."""
    for name, full in (("loss and grad_norm", False), ("all scalar columns", True)):
        with tempfile.TemporaryDirectory(prefix="argus-benchmark-") as place:
            folder = Path(place)
            written, size = _write(folder, events, full)
            begin = time.process_time()
            read = sum(1 for _ in read_run(folder))
            read_s = time.process_time() - begin
            begin = time.process_time()
            folded = _fold(folder)
            fold_s = time.process_time() - begin
            if not read == folded == len(events):
                raise RuntimeError(f"wrote {len(events)} events, read {read}, folded {folded}")
        rates = [len(events) / seconds for seconds in (written, read_s, fold_s)]
        for what, rate in zip(("write", "read", "read and fold"), rates):
            measured = f"{rate:,.0f} events/s of {size:.0f} bytes"
            yield information(f"journal, {name}: {what}", measured, value=rate, bytes=size)


def _write(folder: Path, events: Sequence[StepEvent], full: bool) -> Tuple[float, float]:
    """Seconds that it takes, without making segments, and the bytes of an event."""
    writer = JournalWriter(folder, run_id="benchmark", session="0" * 16, rank=0, world_size=1)
    records = [(event.step, dict(zip(SCALAR_COLUMNS, event[5:21]))) for event in events]
    for columns in (columns for _, columns in records):
        del columns["time_ns"], columns["world_size"], columns["step_time_ms"]
    taken = 0.0
    bytes_before = writer.position
    for at in range(0, len(records), 5000):
        writer.prepare()
        begin = time.process_time()
        if full:
            for step, columns in records[at : at + 5000]:
                writer.append(pack_full(writer.record, time.monotonic_ns(), step, columns)[0])
        else:
            for step, columns in records[at : at + 5000]:
                _write_core(writer, step, columns)
        taken += time.process_time() - begin
    writer.close()
    size = sum(path.stat().st_size for path in folder.glob("*.journal")) - bytes_before
    return taken, size / len(events)


def _write_core(writer: JournalWriter, step: int, columns: Dict[str, Any]) -> None:
    """What step() does with a loss and a gradient norm."""
    if writer.position >= writer.limit:
        writer.rotate()
    position = writer.position
    CORE_STRUCT.pack_into(
        writer.buffer, position, CORE_SIZE, CORE, _BOTH, 0, time.monotonic_ns(), step,
        columns["loss"], columns["grad_norm"], columns["current_lr"], writer.record + 1,
    )  # fmt: skip
    writer.position = position + CORE_SIZE
    writer.record += 1


def _fold(folder: Path) -> int:
    fold = StoredFold(folder, EngineConfig(detectors=BUILTIN), writing=False)
    total = 0
    while True:
        count, _ = fold.advance()
        if not count:
            fold.close()
            return total
        total += count


if __name__ == "__main__":
    main()
