"""How fast a recorded run is judged again, on one core: from Parquet through all detectors.

    python benchmarks/replay_speed.py [--json FILE] [--quick]

The Python fold and the compiled one (deploy/compile_fold.py, made first if it is not there) take
turns, each in a process of its own. Read: Parquet to events; fold: events, made before, to
verdicts and actions; both: the whole way of `argus replay FOLDER`. Times are CPU times of the
process, Arrow's threads included, so what one core gives; the best of the repeats counts, since the
machine may be shared.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from deploy.compile_fold import TARGET, compile_fold

from children import Child, Package, clean_environment
from measure import Progress, Row, arguments, at_least, finish, information, median
from plarv_processors.detectors import BUILTIN
from plarv_processors.engine import Engine, EngineConfig, is_compiled
from plarv_schemas import arrow
from plarv_schemas.events import StepEvent
from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_sinks.exported import read_export
from plarv_sinks.replay import replay
from throughput import healthy_run, with_samples
from workloads import serve

_REACH = 50_000  # steps/s
_REPEATS = 7
_GROUP_ROWS = 16_000
_PARTS = ("both", "fold", "read")


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    options = arguments(__doc__, "replay_speed").parse_args()
    load_before = os.getloadavg()[0]
    count = 5_000 if options.quick else 50_000
    compile_fold(TARGET)
    with tempfile.TemporaryDirectory(prefix="argus-benchmark-") as place:
        scalars = healthy_run(count)
        folders = {
            "all scalar columns": scalars,
            "32 samples a step too": with_samples(scalars[: count // 2]),
        }
        rows: List[Row] = []
        for number, (what, events) in enumerate(folders.items()):
            folder = Path(place) / str(number)
            write_run(folder, events)
            rows.extend(rates(what, folder, _REACH if number == 0 else 0))
        finish("replay_speed", rows, options.json, quick=options.quick, load_before=load_before)


def write_run(folder: Path, events: Sequence[StepEvent]) -> None:
    """The run as an export leaves it."""
    schema = arrow.file_schema("steps")
    folder.mkdir()
    parquet = require_pyarrow("pyarrow.parquet")
    with parquet.ParquetWriter(folder / "steps.parquet", schema, compression="zstd") as writer:
        for start in range(0, len(events), _GROUP_ROWS):
            group = events[start : start + _GROUP_ROWS]
            places = range(start, start + len(group))
            ones = [1] * len(group)
            batch = arrow.encode_steps(group, ordinals=places, attempts=ones, schema=schema)
            writer.write_batch(batch)


def rates(what: str, folder: Path, reach: int) -> Iterator[Row]:
    """Steps a second of both builds, and how much of it is reading and how much judging."""
    children = {name: Child(_package(name), "replay", "replay_speed.py") for name in _PATHS}
    taken: Dict[str, Dict[str, List[float]]] = {
        name: {part: [] for part in _PARTS} for name in children
    }
    said: Dict[str, List[int]] = {}
    bar = Progress(what, _REPEATS)
    for _ in range(_REPEATS):
        for name, child in children.items():
            answer = child.ask(folder=str(folder))
            said[name] = [answer["steps"], answer["records"]]
            for part in _PARTS:
                taken[name][part].append(answer[part])
        bar.add()
    bar.close()
    for child in children.values():
        child.end()
    if said["python"] != said["compiled"]:
        raise RuntimeError(f"the builds differ in steps and records: {said}")
    steps = said["python"][0]
    for name, parts in taken.items():
        best = {part: steps / min(seconds) for part, seconds in parts.items()}
        middle = steps / median(parts["both"])
        measured = (
            f"{best['both']:,.0f} steps/s (read {best['read']:,.0f}, fold {best['fold']:,.0f})"
        )
        values: Dict[str, Any] = {
            "read": best["read"], "fold": best["fold"], "median": middle, "steps": steps,
            "records": said[name][1],
        }  # fmt: skip
        title = f"replay, {name}, {what}"
        if name == "compiled" and reach:
            yield at_least(title, measured, best["both"], reach, "steps/s", **values)
        else:
            yield information(title, measured, value=best["both"], unit="steps/s", **values)


class Replay:
    """One replay of a folder, in parts."""

    def run(self, folder: str) -> Dict[str, float]:
        """Seconds of CPU time of each part, and what was counted."""
        path = Path(folder)
        found: Dict[str, float] = {"compiled": is_compiled(), **self._fold_alone(path)}
        found["read"] = _seconds(lambda: sum(1 for _ in read_export(path)))
        records: List[int] = []
        found["both"] = _seconds(
            lambda: records.append(sum(1 for _ in replay(read_export(path), self._engine())))
        )
        found["records"] = records[0]
        return found

    def _fold_alone(self, path: Path) -> Dict[str, float]:
        events = list(read_export(path))
        seconds = _seconds(lambda: sum(1 for _ in replay(events, self._engine())))
        return {"steps": len(events), "fold": seconds}

    @staticmethod
    def _engine() -> Engine:
        return Engine(EngineConfig(detectors=BUILTIN))


def _seconds(work: Callable[[], object]) -> float:
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


_PATHS: Dict[str, List[str]] = {"python": [], "compiled": [str(TARGET)]}


def _package(name: str) -> Package:
    environment = clean_environment()
    paths = [*_PATHS[name], *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return Package(name, sys.executable, environment, [])


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "replay":
        serve({"replay": Replay})
    else:
        main()
