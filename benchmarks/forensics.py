"""How long it takes to look at one run of a store of many.

    python benchmarks/forensics.py [--json FILE] [--quick]

A store of 1,000 runs of 10,000 steps is made in a temporary folder (half a gigabyte), once as
compaction leaves it and once as the sink writes it: each file a range of offsets, all runs in it.
Then fresh processes open it, list its runs and show the timeline of one. Times are the clock's,
from the end of the imports (polars, pyarrow and ours), whose time is given beside it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, cast

from measure import ROOT, Progress, Row, arguments, at_most, finish, information, median
from plarv_processors.engine import Engine
from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_sinks.store_files import Place, StoreFiles, fresh_path, steps_place, table_path
from plarv_sinks.store_runs import RunProgress

_RUNS = 1_000
_STEPS = 10_000
_FRESH_ROWS = 500_000  # of a file, as the sink's flush_rows
_DATE = "2026-11-23"
_START_NS = 1_763_856_000_000_000_000
_REPEATS = 5

_LOOK = """
import json, sys, time
begun = time.perf_counter()
import polars, pyarrow.parquet
from plarv_sinks.forensics import open_store
imported = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter()
rows = store.runs().height
listed = time.perf_counter()
facts = store.run(sys.argv[2]).timeline().height
done = time.perf_counter()
print(json.dumps(dict(imports=imported - begun, open=opened - imported, runs=listed - opened,
    timeline=done - listed, all=done - imported, rows=rows, facts=facts)))
"""


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    parser = arguments(__doc__, "forensics")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    num_runs = _RUNS // 10 if options.quick else _RUNS
    with tempfile.TemporaryDirectory(prefix="argus-forensics-") as place:
        rows = _rows(Path(place), num_runs)
        finish("forensics", rows, options.json, quick=options.quick, load_before=load_before)


def _rows(place: Path, num_runs: int) -> Iterator[Row]:
    for layout in ("compacted", "fresh"):
        folder = place / layout
        _make(folder, num_runs, layout)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        yield information(
            f"{layout}: the store", f"{size / 1e6:,.0f} MB", bytes=size, runs=num_runs
        )
        yield _looked(folder, layout, num_runs)


def _looked(folder: Path, layout: str, num_runs: int) -> Row:
    chance = random.Random(0)
    looks: List[Dict[str, float]] = []
    for _ in range(_REPEATS):
        looks.append(_look(folder, f"run-{chance.randrange(num_runs):04d}"))
        if looks[-1]["rows"] != num_runs:
            raise RuntimeError(f"{looks[-1]['rows']} of {num_runs} runs were listed")
    parts = {name: median([look[name] for look in looks]) for name in looks[0]}
    measured = (
        f"{parts['all']:.2f} s: open {parts['open']:.2f}, runs() {parts['runs']:.2f}, "
        f"timeline {parts['timeline']:.2f} (imports {parts['imports']:.2f})"
    )
    what = f"{layout}: open, list the runs, one timeline"
    return at_most(what, measured, parts["all"], 1.0, "s", **parts)


def _look(folder: Path, run_id: str) -> Dict[str, float]:
    """The times of one fresh process."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("schemas", "processors", "sinks"))
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(folder), run_id],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    found: Dict[str, float] = json.loads(done.stdout)
    return found


# A store without ten million Python objects: one run is made and folded, and its columns are
# repeated under other names.


class _Pattern:
    """One run: what is alike in all."""

    def __init__(self) -> None:
        self.steps = _steps()
        self.events: List[Event] = [
            ControlEvent(
                "run", "session", 0, 0, "session_started", _START_NS, None, {"mode": "AUTO"}
            ),
            *self.steps,
        ]
        last = ControlEvent(
            "run", "session", _STEPS + 1, 0, "session_finished", _START_NS + _STEPS * 10**9, None,
            {"status": "completed"},
        )  # fmt: skip
        self.events.append(last)
        engine = Engine()
        found = [each for event in self.events for each in engine.fold(event)]
        self.verdicts = [each for each in found if isinstance(each, Verdict)]
        self.actions = [each for each in found if isinstance(each, Action)]
        self.progress = RunProgress("run")
        for event in self.events:
            self.progress.place(event)
        self.batch = arrow.encode_steps(
            self.steps,
            ordinals=range(1, _STEPS + 1),
            attempts=[1] * _STEPS,
            schema=arrow.file_schema("steps"),
        )


def _steps() -> List[StepEvent]:
    chance = random.Random(0)
    made: List[StepEvent] = []
    for step in range(_STEPS):
        spike = 7.0 if 6_000 <= step < 6_010 else 0.0
        made.append(
            StepEvent(
                "run", "session", step + 1, 0, step, _START_NS + step * 10**9,
                epoch=step / 1000, loss=2.0 + 8.0 / (1 + step / 50) + chance.gauss(0, 0.05) + spike,
                grad_norm=1.0 + chance.gauss(0, 0.05), current_lr=6e-4, update_norm=0.5,
                grad_l1_norm=900.0 + chance.gauss(0, 9), grad_l2_norm=1.0,
                forward_ms=80.0 + chance.gauss(0, 1), backward_ms=160.0 + chance.gauss(0, 1),
                step_time_ms=250.0 + chance.gauss(0, 2), batch_size=32,
            )
        )  # fmt: skip
    return made


def _make(folder: Path, num_runs: int, layout: str) -> None:
    folder.mkdir(parents=True)
    files, pattern = StoreFiles(folder), _Pattern()
    names = [f"run-{number:04d}" for number in range(num_runs)]
    progress = Progress(f"making the store, {layout}", num_runs)
    if layout == "compacted":
        for number, name in enumerate(names):
            of_run, schema = steps_place(_DATE, name)
            rows = _of_run(pattern.batch, name, number)
            files.write(f"{of_run}/0.parquet", schema, rows.to_batches())
            progress.add()
        _write_small(files, pattern, names, "")
    else:
        _write_fresh(files, pattern, names, progress)
        _write_small(files, pattern, names, "fresh/")
    progress.close()


def _write_fresh(
    files: StoreFiles, pattern: _Pattern, names: Sequence[str], progress: Progress
) -> None:
    """Each file holds some steps of every run, sorted by run."""
    pa, batch = require_pyarrow(), cast(Any, pattern.batch)
    schema = arrow.file_schema("steps")
    each = max(1, _FRESH_ROWS // len(names))
    for first in range(0, _STEPS, each):
        part = batch.slice(first, each)
        runs = [_of_run(part, name, number) for number, name in enumerate(names)]
        rows = pa.concat_tables(runs).combine_chunks()
        place = Place("0f3a9b2c71de", 0, first, first + each - 1)
        files.write(fresh_path("steps", _DATE, place), schema, rows.to_batches())
        progress.add(max(1, len(names) * each // _STEPS))


def _of_run(part: Any, run_id: str, number: int) -> Any:
    """The rows as those of another run: its id, and other digits, so that no file is small."""
    pa, compute = require_pyarrow(), require_pyarrow("pyarrow.compute")
    ids = pa.repeat(pa.scalar(run_id, pa.string()), part.num_rows)
    rows = pa.Table.from_batches([part]).set_column(0, part.schema.field("run_id"), ids)
    for name in ("loss", "grad_norm", "grad_l1_norm", "forward_ms", "backward_ms", "step_time_ms"):
        place, kind = rows.schema.get_field_index(name), rows.schema.field(name)
        other = compute.multiply(rows.column(name), 1.0 + number / 1e6).cast(kind.type)
        rows = rows.set_column(place, kind, other)
    return rows


def _write_small(files: StoreFiles, pattern: _Pattern, names: Sequence[str], below: str) -> None:
    """The tables that are small: a file of each for all runs."""
    controls = [each for each in pattern.events if isinstance(each, ControlEvent)]
    events = [each._replace(run_id=name) for name in names for each in controls]
    batches: Dict[TableName, RecordBatch] = {
        "events": arrow.encode_controls(
            events,
            ordinals=[0, _STEPS + 1] * len(names),
            attempts=[1] * len(events),
            schema=arrow.file_schema("events"),
        ),
        "verdicts": arrow.encode_verdicts(
            [each._replace(run_id=name) for name in names for each in pattern.verdicts],
            schema=arrow.file_schema("verdicts"),
        ),
        "actions": arrow.encode_actions(
            [each._replace(run_id=name) for name in names for each in pattern.actions],
            schema=arrow.file_schema("actions"),
        ),
        "runs": arrow.encode_runs([pattern.progress.row()._replace(run_id=name) for name in names]),
    }
    for table, batch in batches.items():
        name = f"p00000-0f3a9b2c71de-{0:012d}-{len(names):012d}.parquet"
        files.write(f"{below}{table_path(table, _DATE)}/{name}", arrow.file_schema(table), [batch])


if __name__ == "__main__":
    main()
