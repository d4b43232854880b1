"""The Faust shell: the same folds as in one process, fed by Kafka."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional

from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.decoding import Decoder
from plarv_processors.worker.detector_shell import DetectorShell
from plarv_processors.worker.faust_app import faust
from plarv_processors.worker.health import Health, serve
from plarv_processors.worker.left_out import to_json
from plarv_processors.worker.policy_shell import PolicyShell
from plarv_processors.worker.watchdog import Watchdog, forget_notes, read_notes
from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.locks import FileLock

__all__ = ["Fleet", "WorkerConfig", "build_app", "build_fleet", "run_worker", "take_name"]

_log = logging.getLogger("plarv.worker")

_MAX_WORKERS = 1000  # of one state folder
# Faust's consumer threads ask for the interpreter all the time: a quarter of the loop's CPU time
# went with handing it over every 5 ms, as Python does by default.
_SWITCH_S = 0.02


class Fleet(NamedTuple):
    """What one worker process runs."""

    detectors: DetectorShell
    policy: Optional[PolicyShell]
    health: Health
    watchdog: Watchdog


def build_app(config: WorkerConfig) -> Any:
    """The Faust app of the detectors: one agent each, every one with lanes of its own."""
    return build_fleet(config).detectors.app


def build_fleet(config: WorkerConfig) -> Fleet:
    """The detectors' app, and unless told otherwise the policy's."""
    health = Health(["detectors", "policy"] if config.run_policy else ["detectors"])
    decoder = Decoder()  # one for both: they read the same messages at about the same time
    watchdog = Watchdog(config.state_dir, config.hang_s)
    detectors = DetectorShell(config, decoder, health, watchdog)
    policy = PolicyShell(config, decoder, health) if config.run_policy else None
    return Fleet(detectors, policy, health, watchdog)


def run_worker(config: WorkerConfig, *, ready: Callable[[str], None]) -> int:
    """Runs a worker until it is told to stop; its exit code. The topics are there already.

    ``ready`` hears one line once the metrics are served.
    """
    sys.setswitchinterval(_SWITCH_S)
    config.state_dir.mkdir(parents=True, exist_ok=True)
    _publish_notes(config)
    fleet = build_fleet(config)
    if config.metrics_port is not None:
        port = serve(fleet.health, config.metrics_host, config.metrics_port)
        ready(f"metrics and health on http://{config.metrics_host}:{port}/metrics and /healthz")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    others: List[Any] = [] if fleet.policy is None else [fleet.policy.app]
    fleet.watchdog.start()
    worker: Any = faust.Worker(
        fleet.detectors.app,
        *others,
        loop=loop,
        override_logging=False,
        redirect_stdouts=False,
        quiet=True,
    )
    worker.spinner = None  # it writes escapes, even into a file
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    return 0


def take_name(
    state_root: Path, host: str, name: Optional[str] = None
) -> tuple[str, Path, FileLock]:
    """A name that no living worker of this state folder has, its own folder, and the lock on it.

    ``name``, or the first free one of ``host-1``, ``host-2``, ...: a worker that starts again finds
    its old name and rejoins its group at once. OSError: the folder cannot be written to;
    ValueError: a worker of that name is at work.
    """
    state_root.mkdir(parents=True, exist_ok=True)
    wanted = [f"{host}-{number}" for number in range(1, _MAX_WORKERS)] if name is None else [name]
    for each in wanted:
        folder = state_root / each
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / "worker.lock")
        if lock.acquire():
            return each, folder, lock
    raise ValueError(f"a worker named {wanted[-1]} is at work already, in {state_root}")


def _publish_notes(config: WorkerConfig) -> None:
    """What the last process of this name noted before it ended a detector goes to the topic."""
    notes = read_notes(config.state_dir)
    if not notes:
        return
    with producer_client(config.connection) as producer:
        for note in notes:
            producer.send(
                config.topics.left_out,
                key=f"{note.run_id}\0{note.detector}".encode(),
                value=to_json(note),
                partition=note.partition,
            ).get(timeout=60)
            _log.warning("run %s: %s is left out from here on: it hung", note.run_id, note.detector)
    forget_notes(config.state_dir)
