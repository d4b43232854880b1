"""A worker whose detectors include two faulty ones: one raises on a run, one hangs on a run.

``python -m tests.integration.faulty_worker`` takes the options that WorkerProcess gives.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import ClassVar, Tuple

from plarv_processors.app import run_worker
from plarv_processors.detectors import BUILTIN
from plarv_processors.detectors.detector import Scope, verdict
from plarv_processors.worker.config import WorkerConfig
from plarv_schemas.events import StepEvent, Verdict
from plarv_schemas.kafka_connection import connect_to
from plarv_schemas.topics import Topics

__all__ = ["DETECTORS", "FAULT_STEP", "Hanging", "Raising"]

FAULT_STEP = 150
_EVERY = 25  # steps between two verdicts: enough to see when it is off


def _says(detector: Raising | Hanging, event: StepEvent) -> Tuple[Verdict, ...]:
    if event.step % _EVERY:
        return ()
    return (
        verdict(
            detector, event, kind="seen", level="warn", state="opened", onset_step=event.step,
            score=1.0, threshold=1.0, evidence={}, message=f"step {event.step}",
        ),
    )  # fmt: skip


class Raising:
    """Raises on runs whose id begins with ``raise``."""

    __slots__ = ("version",)

    name: ClassVar[str] = "raising"
    scope: ClassVar[Scope] = "run"

    def __init__(self) -> None:
        self.version = "raising-1"

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """A verdict now and then."""
        if event.step >= FAULT_STEP and event.run_id.startswith("raise"):
            raise RuntimeError("a fault of this test")
        return _says(self, event)


class Hanging:
    """Never returns on runs whose id begins with ``hang``."""

    __slots__ = ("version",)

    name: ClassVar[str] = "hanging"
    scope: ClassVar[Scope] = "run"

    def __init__(self) -> None:
        self.version = "hanging-1"

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """A verdict now and then."""
        while event.step >= FAULT_STEP and event.run_id.startswith("hang") and _IS_LIVE:
            pass
        return _says(self, event)


_IS_LIVE = __name__ == "__main__"  # a replay of the log must not call it; if it does, it goes on
DETECTORS = (*BUILTIN, Raising, Hanging)


def _main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--brokers", "--name", "--metrics-port", "--state-dir"):
        parser.add_argument(name)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    return run_worker(
        WorkerConfig(
            connection=connect_to(options.brokers),
            detectors=DETECTORS,
            all_detectors=DETECTORS,
            topics=Topics(os.environ["ARGUS_TOPIC_PREFIX"]),
            master_key=os.environ["ARGUS_MASTER_KEY"],
            name=options.name,
            state_dir=Path(options.state_dir) / options.name,
            snapshot_s=1.0,
            hang_s=1.0,
            metrics_port=0,
        ),
        ready=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )


if __name__ == "__main__":
    sys.exit(_main())
