"""What a checkpoint costs the training: the step that copies it, and the steps beside its write.

    python benchmarks/checkpoints.py [--json FILE] [--quick]

A snapshot is compared with one plain copy of the same bytes into memory that is ready; both are
taken in turn, so that the machine's load counts for both. The steps beside a write are compared
with the steps before it, over several writes. CPU only.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List, Tuple

from measure import Progress, Row, arguments, at_most, finish, information, median
from plarv.checkpoints.contents import Training
from plarv.checkpoints.ring import give_way
from plarv.checkpoints.snapshot import Snapshot
from plarv.checkpoints.training_state import restore

_ROUNDS = 15
_WRITES = 6


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    options = arguments(__doc__, "checkpoints").parse_args()
    load_before = os.getloadavg()[0]
    layers = [4] if options.quick else [4, 20]
    finish("checkpoints", rows(layers), options.json, quick=options.quick, load_before=load_before)


def rows(layers: List[int]) -> Iterator[Row]:
    """One set of rows for each size of model."""
    for number in layers:
        model, optimizer = _training(number)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        name = f"{millions:.0f} M parameters, AdamW"
        snapshot = Snapshot(Training(model, optimizer))
        snapshot.survey()
        problem = snapshot.prepare()
        if problem is not None:
            raise SystemExit(problem)
        yield _copy_row(name, snapshot)
        with tempfile.TemporaryDirectory() as folder:
            yield _write_row(name, snapshot, model, optimizer, Path(folder))
            begun = time.perf_counter()
            restore(Path(folder), Training(model, optimizer))
            took = time.perf_counter() - begun
        yield information(f"going back, {name}", f"{took:.2f} s", seconds=took)


def _copy_row(name: str, snapshot: Snapshot) -> Row:
    """take() against one copy of as many bytes."""
    import torch

    # Written, each page: what was never written is read from one page that the kernel keeps.
    source = torch.empty(snapshot.size_bytes, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source).fill_(2)
    taken: List[float] = []
    copied: List[float] = []
    progress = Progress(f"snapshots of {name}", _ROUNDS)
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        target.copy_(source)
        copied.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        assert snapshot.take(0)
        taken.append(time.perf_counter() - begun)
        snapshot.release()
        progress.add()
    progress.close()
    ratio = median(taken) / median(copied)
    return at_most(
        f"the step of a snapshot, {name}",
        f"{ratio:.2f} x one copy ({1e3 * median(taken):.1f} of {1e3 * median(copied):.1f} ms, "
        f"{snapshot.size_bytes / 1e6:.0f} MB)",
        ratio,
        1.2,
        "x",
    )


def _write_row(name: str, snapshot: Snapshot, model: Any, optimizer: Any, folder: Path) -> Row:
    """Steps while a slot's files are written, against the steps right before each write."""
    alone: List[float] = []
    beside: List[float] = []
    _steps(model, optimizer, 3)
    progress = Progress(f"writes of {name}", _WRITES)
    for _ in range(_WRITES):
        before = _steps(model, optimizer, 10)
        assert snapshot.take(0)
        during = _steps_beside(model, optimizer, snapshot, folder)
        alone.append(median(before))
        beside.append(median(during))
        progress.add()
    progress.close()
    added = median([then / now for now, then in zip(alone, beside)]) - 1.0
    return at_most(
        f"steps beside a write, {name}",
        f"{100 * added:+.1f} % ({1e3 * median(alone):.1f} ms a step)",
        100 * added,
        5.0,
        "%",
    )


def _steps_beside(model: Any, optimizer: Any, snapshot: Snapshot, folder: Path) -> List[float]:
    def write() -> None:
        give_way()
        for path in folder.iterdir():
            path.unlink()
        snapshot.write(folder)
        snapshot.release()

    thread = threading.Thread(target=write)
    thread.start()
    during: List[float] = []
    while thread.is_alive():
        during.extend(_steps(model, optimizer, 1))
    thread.join()
    return during


def _steps(model: Any, optimizer: Any, steps: int) -> List[float]:
    """Durations of training steps, in seconds."""
    import torch

    took: List[float] = []
    batch = torch.randn(8, 1120)
    for _ in range(steps):
        begun = time.perf_counter()
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        took.append(time.perf_counter() - begun)
    return took


def _training(layers: int) -> Tuple[Any, Any]:
    """A perceptron of ``layers`` blocks of 6.3 million parameters, after its first steps."""
    import torch

    blocks: List[Any] = []
    for _ in range(layers):
        blocks += [torch.nn.Linear(1120, 2800), torch.nn.ReLU(), torch.nn.Linear(2800, 1120)]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    _steps(model, optimizer, 2)
    return model, optimizer


if __name__ == "__main__":
    main()
