"""``argus worker``: the detectors and the policy of a fleet, as Faust agents."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Tuple, Type

from plarv import settings
from plarv.cli.brokers import add_broker_option, fleet_of
from plarv.cli.complaint import Complaint, tell

if TYPE_CHECKING:
    from plarv_processors.app import WorkerConfig
    from plarv_processors.detectors.detector import Detector
    from plarv_schemas.kafka_connection import Connection
    from plarv_schemas.topics import Topics

__all__ = ["add_to"]

_REACH_EVERY_S = 2.0
_NOISY = ("aiokafka", "faust", "kafka", "mode", "plarv_processors.worker.faust_app")
_REPEATS_S = 30.0


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "worker",
        help="run a fleet's detectors and policy",
        description="Reads the fleet's log, runs the detectors over it, and decides what to do. "
        "Start as many as there is work for: they share the partitions.",
    )
    add_broker_option(parser)
    parser.add_argument(
        "--detectors", metavar="NAMES", help="only these, separated by commas (default: all twelve)"
    )
    parser.add_argument("--no-policy", action="store_true", help="detectors alone")
    parser.add_argument(
        "--await",
        dest="awaited",
        metavar="NAMES",
        help="detectors that the policy waits for (default: all)",
    )
    parser.add_argument(
        "--name", help="of this worker, the same over restarts (default: the host's, with a number)"
    )
    parser.add_argument(
        "--partitions", type=int, default=None, help="of topics that are made now (default: 16)"
    )
    parser.add_argument(
        "--metrics-port", type=int, default=9464, help="0: any free one (default: 9464)"
    )
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", help="0.0.0.0 to be reached from outside"
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="default: ARGUS_DIR/workers")
    parser.add_argument(
        "--silent-after", type=float, default=3600.0, metavar="S",
        help="a session without a word for so long has ended (default: 3600)",
    )  # fmt: skip
    parser.add_argument(
        "--snapshot-every", type=float, default=10.0, metavar="S",
        help="between two snapshots of what changed, at least (default: 10)",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="what Faust says, too")
    parser.set_defaults(command=_worker)


def _worker(options: argparse.Namespace) -> int:
    from plarv_schemas.pyarrow_types import leave_pandas_out

    try:
        from plarv_processors.app import run_worker, take_name
    except ImportError as error:
        raise Complaint(
            f"a worker needs Faust ({error}): pip install 'plarv-argus-sdk[engine]'"
        ) from error

    leave_pandas_out()
    _set_up_logging(options.verbose)
    config = _config(options)
    _wait_for_topics(config.connection, config.topics, options.partitions)
    root = options.state_dir or Path(settings.text("ARGUS_DIR")) / "workers"
    try:
        name, folder, lock = take_name(root, socket.gethostname(), options.name)
    except ValueError as error:
        raise Complaint(str(error), 1) from error
    config = dataclasses.replace(config, name=name, state_dir=folder)
    where = ", ".join(config.connection.brokers)
    tell(f"worker {name}: {_what(config)}, log {config.topics.steps} at {where}")
    if config.run_policy and not config.master_key:
        tell("no ARGUS_MASTER_KEY: actions are not signed, and orders are refused")
    try:
        return run_worker(config, ready=tell)
    except OSError as error:
        raise Complaint(f"the worker cannot start: {error.strerror or error}", 1) from error
    finally:
        lock.release()


def _config(options: argparse.Namespace) -> WorkerConfig:
    """What the options and settings say; the name and the folder are still to be taken."""
    from plarv.fleet.connection import master_key
    from plarv_processors.app import WorkerConfig

    fleet = fleet_of(options)
    detectors, everyone = _detectors(options.detectors)
    return WorkerConfig(
        connection=fleet.connection,
        detectors=detectors,
        all_detectors=everyone,
        topics=fleet.topics,
        run_policy=not options.no_policy,
        awaited=None if options.awaited is None else _detectors(options.awaited)[0],
        master_key=master_key(),
        snapshot_s=options.snapshot_every,
        silent_after_s=options.silent_after,
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
    )


def _detectors(
    names: Optional[str],
) -> Tuple[Tuple[Type[Detector], ...], Tuple[Type[Detector], ...]]:
    """Those that are named, in the fleet's order, and all there are."""
    from plarv_processors.detectors import registered

    everyone = registered()
    if names is None:
        return everyone, everyone
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [cls.name for cls in everyone]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise Complaint(
            f"no detector is named {', '.join(unknown) or repr(names)}; there are "
            f"{', '.join(known)}"
        )
    return tuple(cls for cls in everyone if cls.name in wanted), everyone


def _wait_for_topics(connection: Connection, topics: Topics, partitions: Optional[int]) -> None:
    """Makes the topics where there are none; waits for brokers that are not up yet."""
    from plarv_processors.kafka_topics import TopicsError, check_topics, create_topics
    from plarv_schemas.kafka_clients import BrokerError, RefusedError
    from plarv_schemas.topics import DEFAULT_PARTITIONS

    said = False
    while True:
        try:
            created = create_topics(connection, topics, partitions or DEFAULT_PARTITIONS)
            count = check_topics(connection, topics)
        except TopicsError as error:
            raise Complaint(str(error), 1) from error
        except RefusedError as error:
            raise Complaint(str(error), 1) from error
        except BrokerError as error:
            if not said:
                tell(f"{error}; waiting for them")
                said = True
            time.sleep(_REACH_EVERY_S)
            continue
        if created:
            tell(f"created {', '.join(created)} with {count} partitions")
        return


def _what(config: WorkerConfig) -> str:
    if len(config.detectors) == len(config.all_detectors):
        what = f"all {len(config.detectors)} detectors"
    else:
        what = ", ".join(cls.name for cls in config.detectors)
    return what + (" and the policy" if config.run_policy else "")


class _Once(logging.Filter):
    """A line that was said in the last half minute is not said again: while the brokers are away
    the Kafka client says some 1,800 of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: List[Tuple[float, str]] = []

    def filter(self, record: logging.LogRecord) -> bool:
        now, text = time.monotonic(), f"{record.name} {record.msg}"
        self._said = [each for each in self._said if now - each[0] < _REPEATS_S]
        if any(text == each[1] for each in self._said):
            return False
        self._said.append((now, text))
        return True


def _set_up_logging(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not verbose:
        handler.addFilter(_Once())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
